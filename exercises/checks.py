"""What a right answer does: for each function a check, a few statements in words, most of them about closed forms and properties.

A check calls the function with run(…), wherever that computes it, and raises Failed with the first statement that does not hold.
Where a mistake is a common one its value is computed too, so that the message can point at it. Checks never trust what comes
back: `same` compares numbers, shapes and kinds, and grade.py turns whatever else goes wrong in a check into a failure.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parent.parent))
import clip_embed  # noqa: E402
import decoder  # noqa: E402
import prior  # noqa: E402
import upsample  # noqa: E402
from child import Made  # noqa: E402


class Failed(Exception):
    """A statement that does not hold of a submission; kind: the exception that the submission raised, where it did."""

    def __init__(self, statement, kind=None):
        super().__init__(statement)
        self.kind = kind


def expect(holds, statement):
    """Raise Failed(statement) unless it holds."""
    if not holds:
        raise Failed(statement)


def close(got, want, tolerance=1e-4):
    """Whether `got` is a finite tensor or number of `want`'s shape, and everywhere nearly equal."""
    if not isinstance(got, (torch.Tensor, int, float)):
        return False
    got, want = torch.as_tensor(got).double(), torch.as_tensor(want).double()
    return got.shape == want.shape and torch.allclose(got, want, rtol=tolerance, atol=tolerance * 0.1)


def same(got, want, statement, mistakes=None, tolerance=1e-4):
    """Raise Failed unless `got` is nearly `want`. mistakes: {what was probably done: the value that it gives}, to say so."""
    if not isinstance(got, (torch.Tensor, int, float)):
        raise Failed(f"{statement} (expected numbers, got a {type(got).__name__})")
    shape, right = tuple(torch.as_tensor(got).shape), tuple(torch.as_tensor(want).shape)
    expect(shape == right, f"{statement} (expected the shape {right}, got {shape})")
    if not close(got, want, tolerance):
        guess = next((text for text, value in (mistakes or {}).items() if close(got, value, tolerance)), None)
        raise Failed(statement + (f": {guess}" if guess else ""))


def refuses(run, statement, kind, *args, **kwargs):
    """Raise Failed unless run(…) raises an exception of that kind."""
    try:
        run(*args, **kwargs)
    except Failed as failed:
        if failed.kind == kind:
            return
        raise
    raise Failed(statement)


def rng(seed):
    """A generator for the inputs of a check."""
    return torch.Generator().manual_seed(seed)


def unit(*shape, seed=0):
    """Random unit vectors."""
    return F.normalize(torch.randn(shape, generator=rng(seed)), dim=-1)


def generators(n):
    """One torch.Generator a picture."""
    return [rng(100 + k) for k in range(n)]


# ----------------------------------------------------------------------------- CLIP (§2)

def merge_pair(run):
    expect(isinstance(run(("a", "b"), ("a", "b")), tuple), "the result is a tuple of symbols")
    expect(run(("l", "o", "l", "o"), ("l", "o")) == ("lo", "lo"), "every occurrence of the pair is joined, not only the first")
    expect(run(("a", "a", "a"), ("a", "a")) == ("aa", "a"), "pairs are joined from left to right and do not overlap: a a a with "
           "the pair (a, a) is aa a")
    for word, pair in ((("x", "l"), ("l", "o")), (("l",), ("l", "l")), (("o", "l"), ("l", "o"))):
        expect(run(word, pair) == word, f"where the pair does not occur the symbols stay as they are: {word} with {pair}")
    letters = np.random.default_rng(0)
    for _ in range(30):  # on letters str.replace does the same
        word = "".join(letters.choice(list("abc"), letters.integers(1, 12)))
        want = tuple("ab" if c == "X" else c for c in word.replace("ab", "X"))
        expect(run(tuple(word), ("a", "b")) == want, f"{word!r} with the pair (a, b) is {want}")


def encode_word(run):
    def tokens(merges, word):
        tokenizer = clip_embed.Tokenizer(merges)
        ids = run(Made("Tokenizer", [list(m) for m in merges]), word)
        expect(isinstance(ids, list) and all(isinstance(i, int) and 0 <= i < len(tokenizer) for i in ids), "the result is a list of "
               "token numbers")
        return [tokenizer.tokens[i] for i in ids]

    expect(tokens([], "ab") == ["a", "b</w>"], "without merges a word is its bytes, the last one marked as its end")
    got = tokens([("b", "c"), ("a", "b")], "abcd")
    expect(got == ["a", "bc", "d</w>"], "of the pairs in a word the one that was learned earliest is merged first"
           + (": yours takes the leftmost or the latest" if got[:1] == ["ab"] else ""))
    expect(tokens([("a", "b"), ("c", "d</w>"), ("ab", "cd</w>")], "abcd") == ["abcd</w>"], "merging goes on until no pair of the word "
           "was ever learned: merges of merges too")
    expect(tokens([("a", "b")], "abab") == ["ab", "a", "b</w>"], "a merge of inner symbols does not apply at the word's marked end")
    merges = clip_embed.learn_bpe(["a large striped red circle", "a small blue star above a star", "there is a green square"] * 2, 60)
    for word in ("circle", "stars", "squares", "a", "greed", "é", "abovestar"):
        symbols = clip_embed.to_symbols(word)
        for pair in merges:  # BPE's own definition: replay the merges in the order in which they were learned
            symbols = clip_embed.merge_pair(symbols, pair)
        expect(tokens(merges, word) == list(symbols), f"{word!r} is split as if all merges were replayed in their order")


def contrastive_loss(run):
    def loss(z_i, z_t, s, rows=1.0, columns=1.0):
        logits = s * z_i.double() @ z_t.double().T
        picks = torch.arange(len(z_i))
        row, column = (-x.log_softmax(1)[picks, picks].mean() for x in (logits, logits.T))
        return (rows * row + columns * column) / 2

    z = F.normalize(torch.ones(8, 4), dim=1)
    same(run(z, z, torch.tensor(2.0)), torch.tensor(math.log(8)), "where all embeddings are equal every caption is as likely as every "
         "other, and the loss of 8 pairs is log 8", {"take the mean over the batch, not the sum": 8 * math.log(8),
         "the two directions are averaged, not added": 2 * math.log(8)})
    z_i, z_t, scale = unit(6, 5, seed=1), unit(6, 5, seed=2), torch.tensor(1.3)
    same(run(z_i, z_t, scale), loss(z_i, z_t, math.exp(1.3)), "the loss is cross-entropy over rows and columns of the scaled cosines", {
        "logit_scale is a logarithm; multiply the cosines by its exponential": loss(z_i, z_t, 1.3),
        "divided where it should be multiplied: logit_scale is the log of the inverse temperature": loss(z_i, z_t, math.exp(-1.3)),
        "yours looks only along the rows, from pictures to captions": loss(z_i, z_t, math.exp(1.3), 2, 0),
        "yours looks only along the columns, from captions to pictures": loss(z_i, z_t, math.exp(1.3), 0, 2)})
    same(run(z_i, z_t, torch.tensor(9.0)), loss(z_i, z_t, 100), "the temperature is held: exp(logit_scale) is never more than 100",
         tolerance=1e-3)
    expect(loss(z_i, z_t, 5) > 0 and close(run(z_i, z_i, torch.tensor(4.0)), loss(z_i, z_i, math.exp(4))), "pairs that match have a "
           "small loss: row k of one belongs to row k of the other")


# ----------------------------------------------------------------------------- diffusion (§2.1)

def cosine_schedule(run):
    def closed(T, shift=1, s=0.008, power=2):
        f = torch.cos(((torch.arange(T + 1, dtype=torch.float64) / T + s) / (1 + s)) * math.pi / 2) ** power
        return f[shift:T + shift] / f[0]

    for T in (1000, 50):
        got, n = run(T), T - 1
        expect(isinstance(got, torch.Tensor) and got.shape == (T,), f"there is one ᾱ for each of the {T} timesteps")
        expect(got.dtype == torch.float64, "ᾱ is float64: near t = 0 the difference 1 − ᾱ is too small for float32")
        same(got[:n], closed(T)[:n], "ᾱ_t is f((t+1)/T)/f(0), except at the last t", {
            "yours is one step early: t = 0 is already a little noisy": closed(T, 0)[:n],
            "the offset s = 0.008 is missing": closed(T, s=0)[:n],
            "the cosine is to be squared": closed(T, power=1)[:n],
            "ᾱ is the product of the 1 − β": torch.cumprod(1 - closed(T) / closed(T, 0), 0)[:n],
            "these are the β": (1 - closed(T) / closed(T, 0))[:n]}, 1e-9)
        last = got[n] / got[n - 1]
        same(last, torch.tensor(0.001), "β is clipped at 0.999, or the last ᾱ would be 0 and nothing could be divided by it",
             tolerance=1e-6)


def q_sample(run):
    alphas, t = decoder.cosine_schedule(), torch.tensor([3, 250, 700])
    for shape in ((3, 5), (3, 2, 4, 4)):
        ones, zeros, a = torch.ones(shape), torch.zeros(shape), alphas[t].float().view(3, *[1] * (len(shape) - 1))
        same(run(ones, t, zeros, alphas), a.sqrt().expand(shape), "without noise x_t is √ᾱ_t x_0, each row with its own t", {
            "√ᾱ and √(1−ᾱ) are swapped": (1 - a).sqrt().expand(shape), "the square root is missing": a.expand(shape)})
        same(run(zeros, t, ones, alphas), (1 - a).sqrt().expand(shape), "of x_0 = 0 is left √(1−ᾱ_t) ε, noise of variance 1 − ᾱ_t", {
            "that is its variance; the noise is multiplied by its deviation, the square root": (1 - a).expand(shape),
            "1 − √ᾱ is not √(1 − ᾱ)": (1 - a.sqrt()).expand(shape)})
    x_0, eps = torch.randn(2, 3, 5, generator=rng(0))
    a = alphas[t].float()[:, None]
    same(run(x_0, t, eps, alphas), a.sqrt() * x_0 + (1 - a).sqrt() * eps, "x_t is the sum of both")


def posterior(run):
    """q(x_s|x_t, x_0) is the product of two Gaussians in x_s: precisions add."""
    alphas = decoder.cosine_schedule()
    for t, s in ((500, 499), (900, 300), (40, 3)):
        a_t, a_s = float(alphas[t]), float(alphas[s])
        step = a_t / a_s
        precision = 1 / (1 - a_s) + step / (1 - step)
        from_x_0, from_x_t, variance = run(a_t, a_s)
        where = f"(t = {t}, s = {s})"
        same(variance, 1 / precision, f"β̃ is the variance of x_s when x_t and x_0 are both known {where}", {
            "that is β, the variance of x_t given x_s": 1 - step,
            "that is the deviation; the variance is asked for": precision ** -0.5,
            "t and s are swapped in (1−ᾱ_s)/(1−ᾱ_t)": (1 - step) * (1 - a_t) / (1 - a_s),
            "β of a stride is 1 − ᾱ_t/ᾱ_s": (1 - a_t) * (1 - a_s) / (1 - a_t)}, 1e-6)
        x_0, x_t = math.sqrt(a_s) / (1 - a_s) / precision, math.sqrt(step) / (1 - step) / precision
        same(from_x_0, x_0, f"the factor of x_0 {where} is √ᾱ_s β/(1−ᾱ_t)", {
            "yours is that of x_t: first comes x_0": x_t, "that is √ᾱ_t where √ᾱ_s should be": x_0 * math.sqrt(step)}, 1e-6)
        same(from_x_t, x_t, f"the factor of x_t {where} is √(1−β) (1−ᾱ_s)/(1−ᾱ_t)", {
            "the square root of 1 − β is missing": x_t * math.sqrt(step), "that has √ᾱ_t where √(1−β) should be":
            x_t / math.sqrt(step) * math.sqrt(a_t)}, 1e-6)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    same(run(alphas, before)[2][1:], ((1 - before) / (1 - alphas) * (1 - alphas / before))[1:], "tensors of ᾱ give tensors", tolerance=1e-9)


CHECKS = {
    "clip_embed.merge_pair": merge_pair,
    "clip_embed.Tokenizer.encode_word": encode_word,
    "clip_embed.contrastive_loss": contrastive_loss,
    **{f"{stage}.cosine_schedule": cosine_schedule for stage in ("decoder", "prior", "upsample")},
    **{f"{stage}.q_sample": q_sample for stage in ("decoder", "prior", "upsample")},
    **{f"{stage}.posterior": posterior for stage in ("decoder", "prior")},
}

"""What a right answer does: for each function a check, a few statements in words, most of them about closed forms and properties.

A check calls the function with run(…), wherever that computes it, and raises Failed with the first statement that does not hold.
Where a mistake is a common one its value is computed too, so that the message can point at it. Checks never trust what comes
back: `same` compares numbers, shapes and kinds, and grade.py turns whatever else goes wrong in a check into a failure.
"""

import dataclasses
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


def generators(n, seed=0):
    """One torch.Generator a row."""
    return [rng(100 + k + 100_000 * seed) for k in range(n)]


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
        expect(isinstance(ids, list) and all(isinstance(i, int) and 0 <= i < len(tokenizer) for i in ids),
               "the result is a list of "
               "token numbers")
        return [tokenizer.tokens[i] for i in ids]

    expect(tokens([], "ab") == ["a", "b</w>"], "without merges a word is its bytes, the last one marked as its end")
    got = tokens([("b", "c"), ("a", "b")], "abcd")
    expect(got == ["a", "bc", "d</w>"], "of the pairs in a word the one that was learned earliest is merged first"
           + (": yours takes the leftmost or the latest" if got[:1] == ["ab"] else ""))
    expect(tokens([("a", "b"), ("c", "d</w>"), ("ab", "cd</w>")], "abcd") == ["abcd</w>"],
           "merging goes on until no pair of the word "
           "was ever learned: merges of merges too")
    expect(tokens([("a", "b")], "abab") == ["ab", "a", "b</w>"], "a merge of inner symbols does not apply at the word's "
           "marked end")
    merges = clip_embed.learn_bpe(["a large striped red circle", "a small blue star above a star",
                                   "there is a green square"] * 2, 60)
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
    same(run(z, z, torch.tensor(2.0)), torch.tensor(math.log(8)), "where all embeddings are equal every caption is as likely "
         "as every "
         "other, and the loss of 8 pairs is log 8", {"take the mean over the batch, not the sum": 8 * math.log(8),
         "the two directions are averaged, not added": 2 * math.log(8)})
    z_i, z_t, scale = unit(6, 5, seed=1), unit(6, 5, seed=2), torch.tensor(1.3)
    same(run(z_i, z_t, scale), loss(z_i, z_t, math.exp(1.3)), "the loss is cross-entropy over rows and columns of the scaled "
         "cosines", {
        "logit_scale is a logarithm; multiply the cosines by its exponential": loss(z_i, z_t, 1.3),
        "divided where it should be multiplied: logit_scale is the log of the inverse "
        "temperature": loss(z_i, z_t, math.exp(-1.3)),
        "yours looks only along the rows, from pictures to captions": loss(z_i, z_t, math.exp(1.3), 2, 0),
        "yours looks only along the columns, from captions to pictures": loss(z_i, z_t, math.exp(1.3), 0, 2)})
    apart = (loss(z_i[:3], z_t[:3], math.exp(1.3)) + loss(z_i[3:], z_t[3:], math.exp(1.3))) / 2
    same(run(z_i, z_t, scale, 3), apart, "with `group` each group of so many rows is as a batch of its own", {
        "yours compares all rows although `group` is given": loss(z_i, z_t, math.exp(1.3))})
    for highest in (100, 7):
        same(run(z_i, z_t, torch.tensor(9.0), None, highest), loss(z_i, z_t, highest), "the temperature is held: exp(logit_scale) "
             f"is never more than 100, or than `highest`, here {highest}", tolerance=1e-3)
    expect(run(z_i, z_i, scale) < run(z_i, z_t, scale) and close(run(z_i, z_i, torch.tensor(4.0)), loss(z_i, z_i, math.exp(4))),
           "pairs that match have a "
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
        same(run(zeros, t, ones, alphas), (1 - a).sqrt().expand(shape),
             "of x_0 = 0 is left √(1−ᾱ_t) ε, noise of variance 1 − ᾱ_t", {
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
    same(run(alphas, before)[2][1:], ((1 - before) / (1 - alphas) * (1 - alphas / before))[1:], "tensors of ᾱ give tensors",
         tolerance=1e-9)


def learned_log_variance(run):
    beta, tilde = torch.tensor(0.02), torch.tensor(0.005)
    ends = run(torch.tensor([0.0, 1.0]), beta, tilde)
    same(ends, torch.tensor([0.005, 0.02]).log(), "v = 0 is the variance β̃ and v = 1 is β; the result is its logarithm", {
        "the ends are swapped": torch.tensor([0.02, 0.005]).log(), "these are the variances "
        "themselves": torch.tensor([0.005, 0.02])})
    same(run(torch.tensor(0.5), beta, tilde), torch.tensor(0.01).log(),
         "halfway is the geometric mean: logarithms are interpolated, not "
         "variances", {"yours is the logarithm of the arithmetic mean": torch.tensor(0.0125).log()})
    v = torch.linspace(-0.2, 1.2, 12).view(2, 3, 2, 1)
    same(run(v, beta, tilde), v * math.log(0.02) + (1 - v) * math.log(0.005), "v may be of any shape, and is not clamped")


def normal_kl(run):
    def integral(m1, v1, m2, v2):
        x = torch.linspace(m1 - 12 * v1 ** 0.5, m1 + 12 * v1 ** 0.5, 100_001, dtype=torch.float64)
        log_p, log_q = (-(x - m) ** 2 / (2 * v) - 0.5 * math.log(2 * math.pi * v) for m, v in ((m1, v1), (m2, v2)))
        return torch.trapezoid(log_p.exp() * (log_p - log_q), x)

    def kl(m1, v1, m2, v2):
        return run(*(torch.tensor(float(c)) for c in (m1, math.log(v1), m2, math.log(v2))))

    same(kl(0.3, 0.5, 0.3, 0.5), torch.tensor(0.0), "two equal Gaussians have no divergence")
    for case in ((0.3, 0.5, -0.2, 0.9), (0.0, 2.0, 1.5, 0.4), (1.0, 0.7, -1.0, 0.7)):
        m1, v1, m2, v2 = case
        right = integral(*case)
        same(kl(*case), right, "the KL divergence is the mean, under the first Gaussian, of the difference of the log "
             "densities", {
            "yours is that of the second from the first: it is not symmetric": integral(m2, v2, m1, v1),
            "the factor one half is missing": 2 * right, "it is in nats, not in bits": right / math.log(2),
            "the distance of the means is divided by the second's variance, not the first's":
                right + (m1 - m2) ** 2 / 2 * (1 / v1 - 1 / v2),
            "the distance of the means is divided by the variance, not the "
            "deviation": right + (m1 - m2) ** 2 / 2 * (v2 ** -0.5 - 1 / v2)})
    x = torch.randn(4, 2, 3, generator=rng(0))
    same(run(*x), torch.stack([integral(a, math.exp(b), c, math.exp(d)) for a, b, c, d in x.flatten(1).T.tolist()]).view(2, 3),
         "tensors are taken element by element", tolerance=1e-3)


# ----------------------------------------------------------------------------- the decoder (§2.1)

def filled(module, seed=0):
    """The module's weights, random everywhere: zeros would hide mistakes."""
    g = rng(seed)
    return {name: 0.5 * torch.randn(value.shape, generator=g) for name, value in module.state_dict().items()}


def context_attention(run):
    C, hs, B, L = 8, 4, 2, 3
    weights = filled(decoder.AttentionBlock(C, hs, 6, 2))
    block = lambda w: Made("AttentionBlock", C, hs, 6, 2, weights=w)
    x, context = torch.randn(B, C, 2, 3, generator=rng(1)), torch.randn(B, L, 6, generator=rng(2))
    mask = torch.ones(B, L + 6, dtype=torch.bool)
    mask[0, 2] = mask[1, 0] = False

    def by_hand(scale=hs ** -0.5, norm=True, see=mask, add=True, keys=True):
        w = {name: value.double() for name, value in weights.items()}
        linear = lambda y, name: y @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        h = F.group_norm(x.double(), 2, w["norm.weight"], w["norm.bias"]) if norm else x.double()
        out = torch.zeros(B, 6, C, dtype=torch.float64)
        for b in range(B):
            q, k, v = linear(h[b].flatten(1).T, "qkv").chunk(3, 1)
            context_k, context_v = linear(context[b].double(), "context_kv").chunk(2, 1)
            k, v = (torch.cat([context_k, k]), torch.cat([context_v, v])) if keys else (k, v)
            allowed = see[b] if keys else torch.ones(6, dtype=torch.bool)
            for head in range(C // hs):
                part = slice(head * hs, (head + 1) * hs)
                logits = (q[:, part] @ k[:, part].T * scale).masked_fill(~allowed, -math.inf)
                out[b, :, part] = logits.softmax(1) @ v[:, part]
        y = linear(out, "proj_out").transpose(1, 2).view(B, C, 2, 3)
        return (x + y if add else y).float()

    silent = {name: value * (not name.startswith("proj_out")) for name, value in weights.items()}
    same(run(block(silent), x, context, mask), x, "the block adds to x: with a last layer of zeros it changes nothing", {
        "yours puts the attention's result in the place of x": 0 * x})
    right = by_hand()
    got = run(block(weights), x, context, mask)
    other = context.clone()
    other[0, 2] += 3
    expect(close(run(block(weights), x, other, mask), got), "what the mask hides (False) does not matter")
    other[0, 0] += 3
    expect(not close(run(block(weights), x, other, mask), got), "the picture looks at the context, whose keys and values "
           "stand before its own")
    same(got, right, "softmax of q·k/√(head width) over the context and the picture, times the values", {
        "q·k is not divided by the root of a head's width": by_hand(1.0),
        "q·k is divided by the root of a head's width, not of all channels":
        by_hand(C ** -0.5), "q·k is divided by a head's width, not by its root": by_hand(1 / hs),
        "x is to be normalized first": by_hand(norm=False),
        "the mask hides where it is False": by_hand(see=~mask), "the mask is not used": by_hand(see=mask | True)})


def inject(run):
    sizes = dict(image_size=16, channels=16, depth=1, multiples=(1, 2), attention=(8,), head_channels=16, norm_groups=8,
                 dropout=0.0,
                 embed_dim=8, clip_text_width=16, text_layers=0, text_width=12, text_heads=2, text_context=77, vocab_size=50)
    weights = filled(decoder.Decoder(decoder.DecoderConfig(**sizes)))
    model = Made("Decoder", Made("DecoderConfig", **sizes), weights=weights)
    emb, states, z_i = torch.randn(2, 64, generator=rng(1)), torch.randn(2, 5, 12, generator=rng(2)), unit(2, 8, seed=3)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    got, context, seen = run(model, emb, z_i, states, mask)
    project = lambda name: z_i @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
    same(got, emb + project("z_i_to_emb"), "the first way in: z_i, projected, is added to the embedding", {
        "yours replaces the embedding": project("z_i_to_emb"), "yours leaves the embedding as it was": emb})
    same(torch.as_tensor(context.shape), torch.tensor([2, 9, 12]), "the second way in: four tokens beside the caption's five")
    tokens = project("z_i_to_context")
    same(context[:, :4], tokens.view(2, 4, 12), "the first four rows of the context are z_i's tokens, made by one projection", {
        "the caption's states come after z_i's tokens": states[:, :4],
        "each token is a run of text_width numbers of the projection, not every "
        "fourth one": tokens.view(2, 12, 4).transpose(1, 2)})
    same(context[:, 4:], states, "the caption's states follow z_i's tokens unchanged")
    expect(seen.dtype == torch.bool and seen.shape == (2, 9), "the mask grows with the context: one bool a row")
    expect(bool(seen[:, :4].all()) and torch.equal(seen[:, 4:], mask),
           "z_i's four tokens can always be seen, and the caption's mask moves "
           "behind them" + (": yours has its four new places at the end" if bool(seen[:, 5:].all()) else ""))


def check_guidance(eps_at, given, free, half):
    """What holds of guidance in every stage; eps_at(w) is the guided prediction, half: mistakes in what is dropped."""
    same(eps_at(1), given, "guidance scale 1 must return the conditional prediction", {
        "yours returns the unconditional one: guidance is the wrong way round": free,
        "(1+w) ε(c) − w ε(∅) is another convention, whose w is ours minus one": 2 * given - free})
    same(eps_at(0), free, "guidance scale 0 must return the unconditional prediction", {
        "yours returns the conditional one": given, **half})
    same(eps_at(3), free + 3 * (given - free), "guidance goes from the unconditional prediction past the conditional one: "
         "ε(∅) + w (ε(c) − ε(∅))", {
        "yours starts from the conditional one": given + 3 * (given - free),
        "guidance is the wrong way round": free + 3 * (free - given)})


def guided_decoder(run):
    x, z_i = torch.randn(2, 3, 4, 4, generator=rng(1)), unit(2, 4, seed=2)
    text = {"z_t": unit(2, 4, seed=3), "mask": torch.ones(2, 3, dtype=torch.bool)}
    null, times = {"z_t": unit(1, 4, seed=4), "mask": torch.ones(1, 3, dtype=torch.bool)}, []

    def model(x, t, z_i, text):
        expect(len({len(x), len(t), len(z_i), *map(len, text.values())}) == 1,
               "the network's inputs are all of one batch: the null "
               "caption, one row, is repeated for each picture")
        times.extend(t.tolist())
        say = lambda a, b: (a @ torch.tensor([1.0, 2, 3, 4]) + b @ torch.tensor([2.0, -1, 1, 3])).view(-1, 1, 1, 1)
        return 0.1 * x * t[:, None, None, None] / 500 + say(z_i, text["z_t"]), (0 * x + say(z_i, 0 * z_i)) / 10

    t, nothing = torch.full((2,), 500), {k: v.expand(2, -1) for k, v in null.items()}
    (given, v), (free, _) = model(x, t, z_i, text), model(x, t, 0 * z_i, nothing)
    check_guidance(lambda w: run(model, x, 500, z_i, text, null, w)[0], given, free, {
        "the unconditional prediction sees no z_i: zeros in its place": model(x, t, z_i, nothing)[0],
        "the unconditional prediction sees the empty caption, not the caption": model(x, t, 0 * z_i, text)[0]})
    same(run(model, x, 500, z_i, text, null, 3.0)[1], v, "v is the conditional prediction's own: only ε is guided")
    expect(set(times) == {500}, "the network gets the timestep t, one for each picture")


def guided_prior(run):
    x, text, null = torch.randn(2, 4, generator=rng(1)), {"z_t": unit(2, 4, seed=3)}, {"z_t": unit(1, 4, seed=4)}
    def f(x, text):
        expect(len(x) == len(text["z_t"]), "the function's inputs are of one batch: the null caption, one row, is repeated")
        return 0.1 * x + text["z_t"] * torch.tensor([1.0, 2, 3, 4])
    check_guidance(lambda w: run(f, x, text, null, w), f(x, text), f(x, {"z_t": null["z_t"].expand(2, -1)}), {})


def decoder_loss(run):
    alphas, B = decoder.cosine_schedule(), 4000
    x_0, z_i = torch.rand(B, 3, 1, 1, generator=rng(0)) - 0.5, torch.ones(B, 2)
    text = {"z_t": torch.ones(B, 2), "mask": torch.ones(B, 1, dtype=torch.bool)}
    null, seen = {"z_t": torch.zeros(1, 2), "mask": torch.ones(1, 1, dtype=torch.bool)}, {}

    def model(x_t, t, z_i, text):
        whole = t.shape == (B,) and t.dtype == torch.int64 and 0 <= int(t.min()) and int(t.max()) < 1000
        expect(x_t.shape == x_0.shape and whole,
               "each picture gets a timestep of its own, a whole number from 0 to 999")
        seen.update(x_t=x_t.double(), t=t, z_i=z_i[:, 0] == 0, caption=text["z_t"][:, 0] == 0)
        seen["eps"], seen["v"] = 0.4 * x_t + 0.1, 0.5 + 0.1 * x_t
        return seen["eps"].clone().requires_grad_(), seen["v"].clone().requires_grad_()

    def bound(x_0, x_t, t, eps, v, alphas_cumprod):
        seen.update(detached=not eps.requires_grad, learns=v.requires_grad)
        return 1 + t / 100

    def loss(prediction):
        model.config = decoder.DecoderConfig(prediction=prediction)
        got = run(model, x_0, z_i, text, null, generators(B), given={"vlb_term": bound})
        a = alphas[seen["t"]].view(-1, 1, 1, 1)
        noise = (seen["x_t"] - a.sqrt() * x_0) / (1 - a).sqrt()
        return got, noise, (seen["eps"] - noise) ** 2, (1 + seen["t"] / 100).double().mean(), a

    got, noise, squares, vlb, _ = loss("eps")
    share = lambda rows: float(rows.double().mean())
    t = seen["t"].double()
    expect(abs(float(t.mean()) - 499.5) < 25 and t.min() < 15 and t.max() > 984, "the timesteps are drawn evenly from all 1000")
    expect(abs(float(noise.mean())) < 0.05 and abs(float(noise.var()) - 1) < 0.06,
           "x_t is q_sample of x_0 with noise from N(0, 1)")
    run(model, x_0, z_i, text, null, generators(B), time_power=0.5, given={"vlb_term": bound})
    expect(abs(float(seen["t"].double().mean()) - 666.2) < 20, "the timestep is T u^time_power: with 0.5 two thirds of T on average")
    run(model, x_0, z_i, text, null, generators(B, 1), given={"vlb_term": bound})
    expect(not torch.equal(seen["t"].double(), t), "each row draws its timestep from its generators' numbers: from its generators, "
           "not torch's own")
    loss("eps")
    z, c = share(seen["z_i"]), share(seen["caption"])
    expect(abs(z - 0.1) < 0.025 and abs(c - 0.5) < 0.04, f"z_i is dropped 10% of the time and the caption 50% (yours {z:.0%} "
           f"and {c:.0%})")
    expect(abs(share(seen["z_i"] & ~seen["caption"]) - 0.05) < 0.017, "the two are dropped independently: with one random "
           "number for both, "
           "z_i is never dropped while the caption is kept")
    same(got, squares.mean() + 0.001 * 1000 * vlb, "the loss is L_simple + 0.001 T L_vlb's drawn term", {
        "a term of the bound stands for all T of them: it is multiplied by T before the 0.001": squares.mean() + 0.001 * vlb,
        "the bound is missing": squares.mean(), "L_simple is a mean, not a sum": squares.sum() + vlb,
        "the bound has the weight 0.001":
        squares.mean() + 1000 * vlb})
    expect(seen["detached"], "the bound trains only the variance: ε goes into it detached")
    expect(seen["learns"], "the bound trains the variance: v goes into it with its gradient")
    got, noise, squares, vlb, a = loss("velocity")
    same(got, (squares / a).mean() + vlb, "where the network puts out a velocity, ε's squared error counts 1/ᾱ_t times", {
        "yours does not look at config.prediction": squares.mean() + vlb}, 1e-3)


def ddim_step(run):
    alphas = decoder.cosine_schedule()
    x_0, eps = torch.randn(2, 2, 3, generator=rng(0))
    for t, s in ((800, 700), (300, 10)):
        a_t, a_s = float(alphas[t]), float(alphas[s])
        mean, deviation = run(x_0, eps, a_t, a_s, 0.0)
        same(deviation, 0.0, "η = 0 draws no noise: the deviation is 0")
        same(mean, math.sqrt(a_s) * x_0 + math.sqrt(1 - a_s) * eps, "with η = 0 the step puts x_0 and ε together again at ᾱ_s", {
            "yours puts them together at ᾱ_t, where it came from": math.sqrt(a_t) * x_0 + math.sqrt(1 - a_t) * eps})
        variance = 1 / (1 / (1 - a_s) + a_t / a_s / (1 - a_t / a_s))  # of the posterior: precisions add
        mean, deviation = run(x_0, eps, a_t, a_s, 1.0)
        same(deviation, variance ** 0.5, "η = 1 draws as much noise as the posterior has: the deviation is the root of β̃", {
            "that is the variance β̃": variance, "t and s are swapped": (variance * (1 - a_t) ** 2 / (1 - a_s) ** 2) ** 0.5,
            "that is the root of β": (1 - a_t / a_s) ** 0.5})
        same(run(x_0, eps, a_t, a_s, 0.5)[1], 0.5 * variance ** 0.5, "the deviation grows in proportion to η", {
            "η multiplies the deviation, not the variance": (0.5 * variance) ** 0.5})
        same(mean, math.sqrt(a_s) * x_0 + math.sqrt(1 - a_s - variance) * eps,
             "what is kept of ε and what is drawn have together the variance "
             "1 − ᾱ_s", {"ε keeps its whole share, and the noise drawn comes "
                         "on top": math.sqrt(a_s) * x_0 + math.sqrt(1 - a_s) * eps,
                         "the variance is subtracted under the root, not the deviation": math.sqrt(a_s) * x_0 + math.sqrt(
                             max(0, 1 - a_s - variance ** 0.5)) * eps})


# ----------------------------------------------------------------------------- the upsamplers (§2.1)

def gaussian_blur(run):
    weight = torch.exp(-torch.tensor([1.0, 0, 1]) / (2 * 0.6 ** 2))
    flat = torch.full((1, 2, 6, 7), 0.8)
    same(run(flat), flat, "a flat picture stays flat, at its borders too: the kernel sums to 1 and the border is mirrored", {
        "the kernel does not sum to 1": 0.8 * weight.sum() ** 2 * torch.ones(1, 2, 6, 7),
        "the border is filled with zeros": torch.nn.functional.conv2d(F.pad(flat, (1, 1, 1, 1)), torch.outer(weight, weight).div(
            weight.sum() ** 2).expand(2, 1, 3, 3), groups=2)})
    dot = torch.zeros(1, 3, 7, 7)
    dot[0, 1, 3, 3] = 1
    got = run(dot)
    expect(isinstance(got, torch.Tensor) and got.shape == dot.shape, "the picture's shape stays as it is")
    same(got[0, 0], dot[0, 0], "each channel is blurred by itself")
    kernel = lambda w: F.pad(torch.outer(w, w) / w.sum() ** 2, (2, 2, 2, 2))
    for sigma in (0.6, 1.0):
        w = lambda power, factor: torch.exp(-torch.tensor([1.0, 0, 1]) / (factor * sigma ** power))
        same(run(dot, sigma)[0, 1], kernel(w(2, 2)), f"a dot becomes the Gaussian exp(−d²/(2σ²)) in both directions (σ = "
             f"{sigma})", {
            "the factor 2 under the exponent is missing": kernel(w(2, 1)), "σ is to be squared": kernel(w(1, 2))})


def training_crops(run):
    from PIL import Image
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    small = torch.from_numpy(pixels).permute(2, 0, 1)
    large = small.repeat_interleave(4, 1).repeat_interleave(4, 2)
    picture = Image.fromarray(large.permute(1, 2, 0).contiguous().numpy())
    blurred = upsample.gaussian_blur(small[None].float())[0].round()
    config = upsample.UpsamplerConfig(low_size=16, image_size=64, crop=0.25)
    highs, lows = run(picture, config, np.random.SeedSequence(1), 150)
    expect(all(isinstance(c, torch.Tensor) and c.dtype == torch.uint8 for c in (highs, lows)),
           "both are uint8 tensors: (high, low)")
    expect(highs.shape == (150, 3, 16, 16) and lows.shape == (150, 3, 4, 4),
           "a crop has a quarter of the side: 16 of 64 and 4 of 16 pixels")
    places, plain, late = [], 0, 0
    for high, low in zip(highs, lows):
        found = [(x, y) for x in range(13) for y in range(13) if torch.equal(large[:, 4 * y:4 * y + 16, 4 * x:4 * x + 16], high)]
        expect(found, "high crops begin on the low-resolution grid: low pixel (i, j) lies over high pixels (4i … 4i+3, 4j … "
               "4j+3)")
        x, y = found[0]
        part = (slice(None), slice(y, y + 4), slice(x, x + 4))
        plain += torch.equal(small[part], low)
        places.append((x, y))
        alone = upsample.gaussian_blur(small[part][None].float())[0].round()
        late += not torch.equal(small[part], low) and bool((alone - low).abs().max() <= 1)
        if not torch.equal(small[part], low) and not (blurred[part] - low).abs().max() <= 1:
            expect(not late, "the picture is damaged whole and then cropped: a crop damaged by itself has borders that the "
                   "whole never has")
            raise Failed("a low crop is the low-resolution picture over the same place as its high crop, as it is or blurred")
    expect(45 <= plain <= 105, f"half of the crops are blurred, half are sharp (yours: {plain} of 150 sharp)")
    for axis in zip(*places):
        expect(min(axis) == 0 and max(axis) == 12, "crops come from everywhere, the picture's last rows and columns too")
    config = upsample.UpsamplerConfig(low_size=16, image_size=64, crop=0.25, degradation="bsr", damaged=1.0)
    highs, lows = run(picture, config, np.random.SeedSequence(2), 40)
    whole = large.unfold(1, 16, 4).unfold(2, 16, 4).flatten(1, 2).transpose(0, 1)  # all crops on the grid
    sharp = small.unfold(1, 4, 1).unfold(2, 4, 1).flatten(1, 2).transpose(0, 1)
    found = [[k for k in range(len(whole)) if torch.equal(whole[k], high)] for high in highs]
    expect(all(found), "high crops are never damaged")
    expect(sum(torch.equal(sharp[k[0]], low) for k, low in zip(found, lows)) < 25,
           "where the config says bsr, bsr_degrade damages the condition")
    plain = Image.new("RGB", (64, 64), "white")
    plain.paste("black", (0, 0, 4, 4))
    highs, _ = run(plain, dataclasses.replace(config, tries=1000), np.random.SeedSequence(3), 20)
    expect((highs[:, :, 0, 0] == 0).all(1).sum() > 15, "of config.tries crops the one that varies most is kept")


# ----------------------------------------------------------------------------- the prior (§2.2)

def sequence(run):
    sizes = dict(embed_dim=8, clip_text_width=6, text_context=9, width=16, layers=1, heads=2)
    reference = prior.DiffusionPrior(prior.PriorConfig(**sizes))
    weights = filled(reference)
    reference.load_state_dict(weights)
    model, L = Made("DiffusionPrior", Made("PriorConfig", **sizes), weights=weights), 5
    z, t = torch.randn(2, 8, generator=rng(1)), torch.tensor([7, 800])
    text = {"states": torch.randn(2, L, 6, generator=rng(2)), "z_t": unit(2, 8, seed=3),
            "mask": torch.tensor([[True] * 5, [True] * 3 + [False] * 2])}
    x, mask = run(model, z, t, text)
    expect(isinstance(x, torch.Tensor) and x.shape == (2, L + 4, 16), "the sequence has the caption's states and four "
           "places more")
    expect(isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.shape == (2, 1, L + 4, L + 4),
           "the mask is bool, (B, 1, L + 4, L + 4)")
    mask = mask[:, 0]
    expect(not bool(mask[0].triu(1).any()), "no place may look at a later one: row i, column j > i is False")
    expect(bool(mask[1][-1, L:L + 3].all()), "only the caption is padded: the last four places can be looked at")
    expect(bool(mask[0].diagonal().all()), "each place may look at itself: the diagonal is True (the mask is off by one)")
    expect(bool((mask[0] | torch.ones_like(mask[0]).triu(1)).all()), "each place may look at all earlier ones that are no "
           "padding")
    expect(not bool(mask[1][:, 3:L].any()), "no place may look at padding: its columns are False")
    with torch.no_grad():
        place, L = weights["positional_embedding"], 5
        words = reference.text_in(text["states"])
        same(x[:, :L], words + place[:L], "the caption's states come first, projected, with the first L positions", {
            "the position embedding is missing": words})
        time = reference.time_in(prior.timestep_embedding(t, 16))
        parts = {"z_t, times √d": reference.z_t_in(text["z_t"] * 8 ** 0.5), "the timestep's embedding": time,
                 "the noised z_i": reference.z_i_in(z), "the final token": weights["final_token"].expand(2, -1)}
        for k, (name, value) in enumerate(parts.items()):
            same(x[:, L + k], value + place[k - 4], f"place L + {k + 1} holds {name}, with a position of its own", {
                "its place is counted from the end, however short the caption is": value + place[L + k],
                "z_t's coordinates are near 1/√d; multiply by √d": reference.z_t_in(text["z_t"]) + place[k - 4],
                "the position embedding is missing": value,
                **{f"yours holds {other}": v + place[k - 4] for other, v in parts.items()}})
        long = {k: torch.cat([v, v, v], 1) if k != "z_t" else v for k, v in text.items()}
        x, mask = run(model, z, t, long)
        same(x, reference.sequence(z, t, long)[0], "a caption longer than text_context is cut")


def prior_loss(run):
    B, d, alphas, seen = 4000, 8, prior.cosine_schedule(), {}
    z_i, text, null = unit(B, d), {"z_t": torch.ones(B, d)}, {"z_t": torch.zeros(1, d)}

    def model(z, t, text, cache=None):
        expect(z.shape == (B, d) and t.shape == (B,) and t.dtype == torch.int64 and 0 <= int(t.min()) and int(t.max()) < 1000,
               "each embedding gets a timestep of its own, a whole number from 0 to 999")
        seen.update(z=z.double(), t=t, dropped=text["z_t"][:, 0] == 0)
        return 0.5 * z + 0.1

    model.standardize = lambda z_i: 3 * z_i.roll(1, 1) + 1
    got = run(model, z_i, text, null, generators(B))
    t, z_0 = seen["t"], model.standardize(z_i.double())
    a = alphas[t][:, None]
    expect(abs(float(t.double().mean()) - 499.5) < 25 and t.min() < 15 and t.max() > 984,
           "the timesteps are drawn evenly from all 1000")
    early = (seen["z"] - z_0)[t < 20].square().mean()
    expect(early < 0.1, "z_i are standardized (model.standardize) before noise is added")
    noise = (seen["z"] - a.sqrt() * z_0) / (1 - a).sqrt()
    expect(abs(float(noise.mean())) < 0.03 and abs(float(noise.var()) - 1) < 0.04,
           "z_i^(t) is q_sample of the standardized z_i with noise from N(0, 1)")
    share = float(seen["dropped"].double().mean())
    expect(abs(share - 0.1) < 0.025, f"the caption is dropped 10% of the time (yours {share:.0%})")
    out, mse = 0.5 * seen["z"] + 0.1, lambda a, b: (a - b).square().mean()
    same(got, mse(out, z_0), "the loss is the mean squared distance of the prediction to z_i itself, as standardized", {
        "the prior predicts z_i, not the noise": mse(out, noise), "yours compares with z_i as they come": mse(out, z_i.double()),
        "the mean is over coordinates too": mse(out, z_0) * d, "it is squared": (out - z_0).abs().mean()})
    run(model, z_i, text, null, generators(B, 1))
    expect(not torch.equal(seen["t"], t), "each row draws its random numbers from its generator, not from torch's own")
    calls = []

    def noted(z, t, text, cache=None):
        calls.append((z.double(), t, 0.5 * z.double() + 0.1))
        return 0.5 * z + 0.1

    noted.standardize = model.standardize
    got = run(noted, z_i, text, null, generators(B), draws=3)
    expect(len(calls) == 3, "with draws=3 the network is asked three times")
    expect(not torch.equal(calls[0][1], calls[1][1]) and not torch.equal(calls[0][0], calls[1][0]),
           "each draw has a timestep and noise of its own")
    mean = sum(mse(out, z_0) for *_, out in calls) / 3
    same(got, mean, "the loss is the mean over the draws", {"yours is their sum: it is the mean over the draws": 3 * mean})


def estimate_errors(run):
    d, factor = 6, 2.5
    batches = [(unit(8, d, seed=k), {"z_t": torch.full((8, d), float(k))}) for k in (1, 3)]

    def model(z, t, text, cache=None):
        k = int(text["z_t"][0, 0])
        return unit(8, d, seed=k) * factor + (k * t[:, None] / 1000).sqrt()  # off by √(kt/1000) everywhere

    model.standardize = lambda z_i: z_i * factor
    line = torch.arange(1000) / 1000
    rungs = prior.ladder(112, 999)
    absolute = torch.from_numpy(np.interp(np.arange(1000), rungs, [(k / 1000) ** 0.5 * (1 + 3 ** 0.5) / 2 for k in rungs]))
    same(run(model, batches, rng(0)), 2 * line, "errors[t] is the mean squared error of a coordinate at t, over all batches, with "
         "straight lines between "
         "the points", {"yours is of the last batch alone": 3 * line, "yours is of the first batch alone": line,
                        "yours is the sum over the "
                        "coordinates": 2 * d * line, "yours is the sum over the batches": 4 * line,
                        "the squared error is asked for": absolute}, tolerance=1e-3)


def pca(run):
    g = rng(0)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=g))[0]
    batches = [torch.randn(n, 5, generator=g) * torch.tensor([3.0, 2, 1.2, 0.7, 0.3]) @ turn + shift for n,
               shift in ((100, 1.0), (40, -0.5), (60, 2.0))]
    z = torch.cat(batches).double()
    mean, components, variances = run(batches)
    same(mean, z.mean(0), "the mean is that of all embeddings, whatever the batches", {
        "batches count by their sizes: yours is the mean of the batches' "
        "means": torch.stack([b.double().mean(0) for b in batches]).mean(0)})
    def spectrum(centred, n):
        return torch.linalg.svdvals(centred) ** 2 / n
    right = spectrum(z - z.mean(0), 200)
    within = torch.cat([b.double() - b.double().mean(0) for b in batches])
    same(variances, right, "the variances along the components, largest first", {
        "yours are ascending": right.flip(0), "subtract the mean first": spectrum(z, 200),
        "divide by n, not n − 1": right * 200 / 199,
        "these are sums, not yet divided by n": right * 200, "these are deviations": right.sqrt(),
        "the batches' means differ, and that is variance too": spectrum(within, 200)})
    vectors = torch.linalg.svd(z - z.mean(0))[2]
    expect(isinstance(components, torch.Tensor) and components.shape == (5, 5), "the components are (d, d)")
    like = lambda c: close((c.double() @ vectors.T).abs(), torch.eye(5), 1e-3)
    expect(like(components), "each row is a component of unit length, the one of largest variance first"
           + (": yours stand in columns" if like(components.T) else ": yours are ascending" if like(components.flip(0)) else
              ": yours stand in columns, ascending" if like(components.T.flip(0)) else ""))
    bad = torch.cat(batches).clone()
    bad[7, 2] = math.nan
    refuses(run, "an embedding with NaN in it raises ValueError", "ValueError", [bad])
    refuses(run, "fewer embeddings than dimensions raise ValueError", "ValueError", [torch.randn(4, 5, generator=g)])
    bad = torch.cat(batches).clone()
    bad[:, 3] = 0.25
    refuses(run, "a coordinate that never changes raises ValueError", "ValueError", [bad])


def quantile_buckets(run):
    values = torch.randn(2, 4000, generator=rng(0)) ** 3
    edges, centres = run(values, 8)
    expect(edges.shape == (2, 7) and centres.shape == (2, 8), "8 buckets have 7 edges and 8 centres, for each row")
    for row, edge, centre in zip(values, edges.contiguous(), centres):
        bucket = torch.searchsorted(edge, row)
        counts = torch.bincount(bucket, minlength=8)
        expect(bool((counts - 500).abs().max() <= 2), f"the buckets hold equally many values, here 500 each (yours "
               f"{counts.tolist()}): they are not "
               "equally wide")
        for k in range(8):
            inside = row[bucket == k]
            expect(abs(int((inside < centre[k]).sum()) - 250) <= 2, "a bucket's centre is its median: as many of its values "
                   "lie below as above")
    same(run(torch.arange(5.0), 2)[0], torch.tensor([2.0]), "two buckets meet at the median")


def embeddings():
    """2,000 unit vectors whose variance lies mostly in a few directions, off the origin."""
    z = torch.randn(2000, 8, generator=rng(0)) * torch.tensor([3.0, 2, 1, 0.6, 0.4, 0.05, 0.03, 0.02])
    return F.normalize(z @ torch.linalg.qr(torch.randn(8, 8, generator=rng(1)))[0] + torch.arange(8.0) / 2, dim=1)


def fit_codes(run):
    z, right = embeddings(), prior.fit_codes(embeddings(), 256)
    codes, K = run(z, 256), len(right["components"])
    expect(isinstance(codes, dict) and codes.keys() == right.keys(), "the result is a dictionary of mean, components, edges "
           "and centres")
    kept = len(codes["components"])
    expect(kept == K, f"kept are the fewest components for which under 1% of the variance is lost: {K} here, yours keeps {kept}")
    for name, what in (("mean", "the embeddings' mean"), ("components", "the first components"),
                       ("edges", "the edges of each component's buckets"),
                       ("centres", "the centres of each component's buckets")):
        same(codes[name], right[name], f"{name} holds {what}, of the values along the components less the mean", {
            "the values are those of (z_i − mean), not of z_i": right[name] + (right["mean"] @ right["components"].T)[:, None]}
            if name in ("edges", "centres") else None, 1e-3)
    expect(all(v.dtype == torch.float32 for v in codes.values()), "the arrays are float32")
    more = prior.fit_codes(z, 256, 0.0003)
    expect(len(run(z, 256, 0.0003)["components"]) == len(more["components"]),
           "what may be lost is `lose`; quantization's blur counts too")
    refuses(run, "buckets too few for any number of components raise ValueError", "ValueError", z, 2)


def ar_prior():
    """(a request for a small ARPrior with fitted codes, its codes)."""
    codes = prior.fit_codes(embeddings(), 256)
    sizes = dict(embed_dim=8, clip_text_width=4, components=len(codes["components"]), buckets=256, width=16, layers=1, heads=2)
    weights = prior.ARPrior(prior.ARConfig(**sizes)).state_dict() | codes
    return Made("ARPrior", Made("ARConfig", **sizes), weights=weights), codes


def encode(run):
    (model, codes), z = ar_prior(), embeddings()[:50]
    bucket = lambda values: (values[..., None] > codes["edges"]).sum(-1)
    got = run(model, z)
    expect(isinstance(got, torch.Tensor) and got.dtype == torch.int64, "codes are whole numbers, int64")
    same(got, bucket((z - codes["mean"]) @ codes["components"].T), "a code is the number of edges below the component's value", {
        "subtract the mean first": bucket(z @ codes["components"].T)}, 1e-9)


def decode(run):
    (model, codes), z = ar_prior(), embeddings()[:50]
    values = codes["centres"].gather(1, (((z - codes["mean"]) @ codes["components"].T)[..., None] > codes["edges"]).sum(-1).T).T
    numbers = (((z - codes["mean"]) @ codes["components"].T)[..., None] > codes["edges"]).sum(-1)
    raw = values @ codes["components"]
    got = run(model, numbers)
    same(got, F.normalize(raw + codes["mean"], dim=1), "z_i is made of the buckets' centres along the components, plus the "
         "mean, at unit norm", {
        "the mean is to be added back": F.normalize(raw, dim=1), "cutting components off and rounding lose unit norm: "
        "renormalize": raw + codes["mean"]})
    expect(bool(((got * z).sum(1) > 0.99).all()), "decoding the codes of z_i gives nearly z_i again")


# ----------------------------------------------------------------------------- manipulations (§3)

def invert(run):
    """With the exact ε-predictor of pixels drawn from N(0.2, 0.3²) for a network."""
    alphas, x_0, times, starts = decoder.cosine_schedule(), 0.2 + 0.3 * torch.randn(2, 3, 8, 8, generator=rng(0)), [], []

    def model(x, t, z_i, text):
        expect(x.shape == x_0.shape and bool((z_i == 1).all()), "inversion is unguided: the network is asked for the "
               "condition alone")
        times.append(int(t[0]))
        starts.append(x)
        a = alphas[t].view(-1, 1, 1, 1)
        mean = 0.2 + a.sqrt() * 0.09 / (a * 0.09 + 1 - a) * (x - a.sqrt() * 0.2)
        return ((x - a.sqrt() * mean) / (1 - a).sqrt()).float(), 0 * x

    model.config = decoder.DecoderConfig(image_size=8)
    z_i, text, steps = torch.ones(2, 4), {"z_t": torch.zeros(2, 4)}, 20
    rungs = decoder.inversion_ladder(steps)
    x_T = run(model, x_0, z_i, text, generators(2), steps)
    expect(times and times[0] == rungs[0], f"inversion climbs: it begins at the lowest of inversion_ladder's steps, t = "
           f"{rungs[0]}, and ends at the highest"
           + (": yours begins at the top" if times[:1] == rungs[-1:] else ""))
    a = float(alphas[rungs[0]])
    noise = (starts[0] - math.sqrt(a) * x_0) / math.sqrt(1 - a)
    expect(abs(float(noise.var()) - 1) < 0.2, "it starts from x_t ~ q(x_t|x_0) on the lowest rung, with noise drawn from the "
           "generators, not from x_0 itself")
    expect(times == rungs, "the network is asked once on each rung, in ascending order")
    times.clear()
    right = decoder.invert(model, x_0, z_i, text, generators(2), steps)
    a = [float(alphas[t]) for t in rungs]
    late, swapped = (starts[0] for _ in range(2))
    for n in range(1, steps):
        eps = model(late, torch.full((2,), rungs[n - 1]), z_i, text)[0]
        late = math.sqrt(a[n]) * decoder.predict_x_0(late, eps, a[n - 1]) + math.sqrt(1 - a[n]) * eps
    same(x_T, right, "each step s → t moves along ε(x_t, t), at a first guess of x_t that the ε of the rung below gives", {
        "yours moves along the ε of the rung below, which belongs to another x and t": late}, 1e-3)
    back = decoder.sample(model, z_i, text, {k: v[:1] for k, v in text.items()}, None, 1, steps, eta=0, x_T=x_T, clamp=False)
    expect(float((back - x_0.clamp(-1, 1)).square().mean().sqrt()) < 0.08, "decoded by DDIM with η = 0, x_T is the picture again")


def slerp(run):
    right = lambda angle: torch.tensor([[math.cos(angle), math.sin(angle)]])
    a, b = torch.tensor([[1.0, 0]]), torch.tensor([[0, 1.0]])
    for theta in (0.2, 0.5):
        line = (1 - theta) * a + theta * b
        same(run(a, b, theta), right(theta * math.pi / 2), f"between two unit vectors at a right angle, θ = {theta} is on the "
             f"circle, at {theta} of the angle", {
            "that is the straight line: its vectors are too short": line,
            "equal θ are equal angles: a straight line, normalized, "
            "moves faster in the middle": F.normalize(line, dim=1), "θ runs the other way: 0 is a, "
            "1 is b": right((1 - theta) * math.pi / 2)})
    a, b = unit(4, 16, seed=1), unit(4, 16, seed=2)
    same(run(a, b, 0), a, "θ = 0 is a")
    same(run(a, b, 1), b, "θ = 1 is b")
    path = torch.stack([run(a, b, k / 4) for k in range(5)]).double()
    same(path.norm(dim=-1), torch.ones(5, 4), "slerp of unit vectors keeps unit norm")
    angle = torch.acos((a * b).sum(1).double()) / 4
    same(torch.acos((path[1:] * path[:-1]).sum(-1).clamp(-1, 1)), angle.expand(4, 4),
         "equal steps of θ are equal angles, in each row", tolerance=1e-3)
    same(run(torch.tensor([[2.0, 0]]), torch.tensor([[0, 4.0]]), 0.25).norm(), torch.tensor(2.5),
         "the norms change evenly: the angle is taken between "
         "the directions, and the length goes from |a| to |b|", {"vectors are normalized before the angle is taken; then "
                                                                 "their length is put back": 1.0})
    x, y = torch.randn(2, 1, 3, 32, 32, generator=rng(3))
    expect(abs(float(run(x, y, 0.5).var()) - 1) < 0.08, "noise stays as large as noise is: pictures are flattened, and the "
           "result has their shape")
    same(run(a, a, 0.3), a, "between two equal vectors there is only that one (and no division by sin 0)")
    same(run(a, 3 * a, 0.5), 2 * a, "parallel vectors keep their direction")
    refuses(run, "opposite vectors raise UserError: no shortest way leads from one to the other", "UserError", a, -a, 0.5)
    refuses(run, "θ outside 0 … 1 raises UserError", "UserError", a, b, 1.2)


def on_circle(a, b, theta):
    """slerp of unit vectors (B, d)."""
    angle = torch.acos((a * b).sum(1, keepdim=True).double())
    return (((1 - theta) * angle).sin() * a + (theta * angle).sin() * b) / angle.sin()


def spied(B, n, seen):
    """A stand-in for manipulate.decode that remembers what it was asked for."""
    def decode(stack, z_i, x_T, captions="", eta=0.0, steps=50, seed=0, bar=False):
        expect(z_i.shape == (B, n, 6) and x_T.shape == (B, n, 3, 2, 2),
               f"decode is given z_i and x_T of all {n} frames of the {B} pictures")
        seen.update(z_i=z_i.double(), x_T=x_T, captions=captions, eta=eta, steps=steps)
        return z_i[..., :1, None, None].expand(B, n, 3, 2, 2)
    return decode


def text_diff(run):
    words = {"a red circle": unit(6, seed=5), "a blue circle": unit(6, seed=6), "the same circle": unit(6, seed=5)}
    z_i, x_T, seen, stack = unit(2, 6, seed=1), torch.randn(2, 3, 2, 2, generator=rng(2)), {}, {"clip": "clip",
        "tokenizer": "tokenizer"}

    def encode_captions(clip, tokenizer, captions):
        expect(all(caption in words for caption in captions), "the captions read are `to` and `source`")
        return {"z_t": torch.stack([words[caption] for caption in captions])}, {"z_t": torch.zeros(1, 6)}

    def restored(stack, z_i, z_theta, t=160):
        seen["restored"] = True
        return F.normalize(2 * z_theta.double() - z_i, dim=1)

    given = {"encode_captions": encode_captions, "decode": spied(2, 5, seen), "restored": restored}
    got = run(stack, z_i, x_T, "a blue circle", "a red circle", 0.4, 5, "a caption", 20, given=given)
    expect("restored" not in seen, "without `restore`, z_θ stays as slerp gives it")
    there, here = words["a blue circle"].expand(2, -1), words["a red circle"].expand(2, -1)
    z, toward = seen["z_i"], F.normalize(there - here, dim=1)
    same(z[:, 0], z_i, "the first frame, θ = 0, is the picture's own z_i", {"the way leads from z_i to z_d, not back": toward})
    same(z[:, 4], on_circle(z_i, toward, 0.4), "the last frame is slerp(z_i, z_d, maximum), with z_d the normalized "
         "difference of the captions", {
        "the difference is the wanted caption less the picture's own": on_circle(z_i, -toward, 0.4),
        "yours goes towards the wanted caption itself": on_circle(z_i, there, 0.4),
        "yours goes all the way: θ ends at maximum": toward,
        "z_d is to be normalized": on_circle(z_i, toward, 0.4) * (0.6 + 0.4 * (there - here).norm(dim=1, keepdim=True))})
    for k in range(5):
        same(z[:, k], on_circle(z_i, toward, 0.1 * k), "the frames' θ are evenly spaced from 0 to maximum")
    same(seen["x_T"], x_T[:, None].expand(-1, 5, -1, -1, -1), "x_T stays the picture's own in all frames")
    expect(seen["eta"] == 0 and seen["steps"] == 20 and seen["captions"] == "a caption",
           "decoding repeats the inversion's captions and steps, with η = 0")
    same(got, seen["z_i"][..., :1, None, None].expand(2, 5, 3, 2, 2), "the result is what decode gives")
    run(stack, z_i, x_T, "a blue circle", None, 0.4, 5, given=given)
    same(seen["z_i"][:, 4], on_circle(z_i, there, 0.4), "without a source, z_d is z_t of the wanted caption")
    run(stack, z_i, x_T, "a blue circle", "a red circle", 0.4, 5, restore=True, given=given)
    for k in range(5):
        moved = on_circle(z_i, toward, 0.1 * k)
        same(seen["z_i"][:, k], restored(stack, z_i, moved), "with `restore`, z_θ of every frame is restored", {
            "yours stays as slerp gives it": moved, "z_i comes first, then z_θ": restored(stack, moved, z_i)})
    refuses(run, "two captions that say the same to CLIP raise UserError", "UserError", stack, z_i, x_T, "the same circle",
            "a red circle", 0.4, 5, given=given)


def pca_reconstruct(run):
    z_i, x_T, seen = unit(2, 6, seed=1), torch.randn(2, 3, 2, 2, generator=rng(2)), {}
    components, mean = torch.linalg.qr(torch.randn(6, 6, generator=rng(3)))[0][:5], 0.3 * unit(6, seed=4)
    given, counts = {"decode": spied(2, 3, seen)}, [2, 5, 0]
    run({}, z_i, x_T, mean, components, counts, given=given)
    for n, k in enumerate(counts):
        part = lambda z: z @ components[:k].T @ components[:k]
        same(seen["z_i"][:, n], mean + part(z_i - mean), f"z_i of {k} components is the mean plus its part along the first {k}", {
            "the mean is to be added back": part(z_i - mean),
            "subtract the mean before you project": mean + part(z_i),
            "the sum is not to be normalized": F.normalize(mean + part(z_i - mean), dim=1)})
    same(seen["x_T"], x_T[:, None].expand(-1, 3, -1, -1, -1), "all are decoded from the one x_T")
    refuses(run, "more components than there are raise UserError", "UserError", {}, z_i, x_T, mean, components, [6],
            given={"decode": spied(2, 1, seen)})


CHECKS = {
    "clip_embed.merge_pair": merge_pair,
    "clip_embed.Tokenizer.encode_word": encode_word,
    "clip_embed.contrastive_loss": contrastive_loss,
    **{f"{stage}.cosine_schedule": cosine_schedule for stage in ("decoder", "prior", "upsample")},
    **{f"{stage}.q_sample": q_sample for stage in ("decoder", "prior", "upsample")},
    **{f"{stage}.posterior": posterior for stage in ("decoder", "prior")},
    "decoder.learned_log_variance": learned_log_variance,
    "decoder.normal_kl": normal_kl,
    "decoder.AttentionBlock.forward": context_attention,
    "decoder.Decoder.inject": inject,
    "decoder.guided": guided_decoder,
    "prior.guided": guided_prior,
    "decoder.decoder_loss": decoder_loss,
    **{f"{stage}.ddim_step": ddim_step for stage in ("decoder", "upsample")},
    "upsample.gaussian_blur": gaussian_blur,
    "upsample.training_crops": training_crops,
    "prior.DiffusionPrior.sequence": sequence,
    "prior.prior_loss": prior_loss,
    "prior.estimate_errors": estimate_errors,
    "prior.pca": pca,
    "prior.quantile_buckets": quantile_buckets,
    "prior.fit_codes": fit_codes,
    "prior.ARPrior.encode": encode,
    "prior.ARPrior.decode": decode,
    "decoder.invert": invert,
    "manipulate.slerp": slerp,
    "manipulate.text_diff": text_diff,
    "manipulate.pca_reconstruct": pca_reconstruct,
}

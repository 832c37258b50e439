"""Wrong answers that students really write, as small changes of the reference: each must be refused, with a message that helps.

WRONG[exercise] is a list of (function, the mistake, words that the grader's message must contain, [(old, new), …]). A change
applies to that function's source in every stage file that has it; `old` must occur there exactly once.
"""

import ast

from hand_out import find

WRONG = {
    1: [("merge_pair", "joins the first occurrence alone", "every occurrence", [
            ("symbols[i:i + 2] == pair", "symbols[i:i + 2] == pair and len(out) == i")]),
        ("merge_pair", "steps over a symbol after each merge", "every occurrence", [("        i += step", "        i += 2 * step - 1")]),
        ("Tokenizer.encode_word", "merges the leftmost known pair", "learned earliest", [
            ("key=lambda p: self.rank.get(p, len(self.rank))", "key=lambda p: p not in self.rank")]),
        ("Tokenizer.encode_word", "merges once", "goes on until", [("while len(symbols) > 1:", "for _ in range(1):")])],
    2: [("contrastive_loss", "looks along the rows alone", "only along the rows", [
            ("(F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2", "F.cross_entropy(logits, target)")]),
        ("contrastive_loss", "takes logit_scale for the scale itself", "logit_scale is a logarithm", [(".exp()", "")]),
        ("contrastive_loss", "forgets to hold the temperature", "never more than 100", [(".clamp(max=float(np.log(100)))", "")])],
    3: [("cosine_schedule", "does not clip β", "clipped at 0.999", [(".clamp(max=0.999)", "")]),
        ("cosine_schedule", "forgets the square", "to be squared", [(" * math.pi / 2) ** 2", " * math.pi / 2)")]),
        ("cosine_schedule", "multiplies the β", "product of the 1 − β", [("cumprod(1 - betas, 0)", "cumprod(betas, 0)")]),
        ("cosine_schedule", "begins a step early", "one step early", [
            ("betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)", "betas = torch.cat([0 * f[:1], 1 - f[1:-1] / f[:-2]])")])],
    4: [("q_sample", "swaps √ᾱ and √(1−ᾱ)", "swapped", [
            ("at(alphas_cumprod.sqrt(), t, x_0) * x_0 + at((1 - alphas_cumprod).sqrt(), t, x_0) * eps",
             "at((1 - alphas_cumprod).sqrt(), t, x_0) * x_0 + at(alphas_cumprod.sqrt(), t, x_0) * eps")]),
        ("q_sample", "multiplies the noise by its variance", "by its deviation", [("(1 - alphas_cumprod).sqrt()", "1 - alphas_cumprod")]),
        ("q_sample", "gives all rows the first one's t", "each row with its own t", [
            ("at(alphas_cumprod.sqrt(), t, x_0)", "alphas_cumprod.sqrt()[t[0]].float()")])],
    5: [("posterior", "returns the deviation", "that is the deviation", [
            ("beta * (1 - alpha_s) / (1 - alpha_t)\n", "(beta * (1 - alpha_s) / (1 - alpha_t)) ** 0.5\n")]),
        ("posterior", "returns β for β̃", "that is β", [("return from_x_0, from_x_t, beta * (1 - alpha_s) / (1 - alpha_t)",
                                                        "return from_x_0, from_x_t, beta")]),
        ("posterior", "takes 1 − ᾱ_t for β", "β of a stride", [("beta = 1 - alpha_t / alpha_s", "beta = 1 - alpha_t")]),
        ("posterior", "forgets the root of 1 − β", "square root of 1 − β", [("(1 - beta) ** 0.5", "(1 - beta)")])],
}


def apply(source, function, changes):
    """A module's source with the changes made in one of its functions. Raises ValueError where one does not fit."""
    node, lines = find(ast.parse(source), function), source.splitlines(True)
    first, last = node.lineno - 1, node.end_lineno
    body = "".join(lines[first:last])
    for old, new in changes:
        if body.count(old) != 1:
            raise ValueError(f"{function}: {old!r} occurs {body.count(old)} times, expected once")
        body = body.replace(old, new)
    return "".join([*lines[:first], body, *lines[last:]])

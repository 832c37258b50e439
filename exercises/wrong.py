"""Wrong answers that students really write, as small changes of the reference: each must be refused, with a message that helps.

WRONG[exercise] is a list of (function, the mistake, words that the grader's message must contain, [(old, new), …]). A change
applies to that function's source in every stage file that has it; `old` must occur there exactly once.
"""

import ast

from hand_out import find

WRONG = {
    1: [("merge_pair", "joins the first occurrence alone", "every occurrence", [
            ("symbols[i:i + 2] == pair", "symbols[i:i + 2] == pair and len(out) == i")]),
        ("merge_pair", "steps over a symbol after each merge", "every occurrence", [("        i += step", "        i += 2 * "
            "step - 1")]),
        ("Tokenizer.encode_word", "merges the leftmost known pair", "learned earliest", [
            ("key=lambda pair: self.rank.get(pair, math.inf)", "key=lambda pair: pair not in self.rank")]),
        ("Tokenizer.encode_word", "merges once", "goes on until", [("while len(symbols) > 1:", "for _ in range(1):")])],
    2: [("contrastive_loss", "looks along the rows alone", "only along the rows", [
            ("(F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2", "F.cross_entropy(logits, target)")]),
        ("contrastive_loss", "takes logit_scale for the scale itself", "logit_scale is a logarithm", [(".exp()", "")]),
        ("contrastive_loss", "forgets to hold the temperature", "never more than 100", [(".clamp(max=math.log(highest))", "")]),
        ("contrastive_loss", "does not look at the groups", "although `group` is given", [("if group:", "if False:")])],
    3: [("cosine_schedule", "does not clip β", "clipped at 0.999", [(".clamp(max=0.999)", "")]),
        ("cosine_schedule", "forgets the square", "to be squared", [(" * math.pi / 2) ** 2", " * math.pi / 2)")]),
        ("cosine_schedule", "multiplies the β", "product of the 1 − β", [("cumprod(1 - betas, 0)", "cumprod(betas, 0)")]),
        ("cosine_schedule", "begins a step early", "one step early", [
            ("betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)", "betas = torch.cat([0 * f[:1], 1 - f[1:-1] / f[:-2]])")])],
    4: [("q_sample", "swaps √ᾱ and √(1−ᾱ)", "swapped", [
            ("at(alphas_cumprod.sqrt(), t, x_0) * x_0 + at((1 - alphas_cumprod).sqrt(), t, x_0) * eps",
             "at((1 - alphas_cumprod).sqrt(), t, x_0) * x_0 + at(alphas_cumprod.sqrt(), t, x_0) * eps")]),
        ("q_sample", "multiplies the noise by its "
         "variance", "by its deviation", [("(1 - alphas_cumprod).sqrt()", "1 - alphas_cumprod")]),
        ("q_sample", "gives all rows the first one's t", "each row with its own t", [
            ("at(alphas_cumprod.sqrt(), t, x_0)", "alphas_cumprod.sqrt()[t[0]].float()")])],
    5: [("posterior", "returns the deviation", "that is the deviation", [
            ("beta * (1 - alpha_s) / (1 - alpha_t)\n", "(beta * (1 - alpha_s) / (1 - alpha_t)) ** 0.5\n")]),
        ("posterior", "returns β for β̃", "that is β", [("return from_x_0, from_x_t, beta * (1 - alpha_s) / (1 - alpha_t)",
                                                        "return from_x_0, from_x_t, beta")]),
        ("posterior", "takes 1 − ᾱ_t for β", "β of a stride", [("beta = 1 - alpha_t / alpha_s", "beta = 1 - alpha_t")]),
        ("posterior", "forgets the root of 1 − β", "square root of 1 − β", [("(1 - beta) ** 0.5", "(1 - beta)")])],
    6: [("learned_log_variance", "swaps the ends", "swapped", [("v * torch.log(beta) + (1 - v) * torch.log(beta_tilde)",
                                                               "v * torch.log(beta_tilde) + (1 - v) * torch.log(beta)")]),
        ("learned_log_variance", "interpolates the variances", "geometric mean", [
            ("v * torch.log(beta) + (1 - v) * torch.log(beta_tilde)", "torch.log(v * beta + (1 - v) * beta_tilde)")]),
        ("normal_kl", "divides by the first "
         "variance", "second's variance", [("torch.exp(-log_variance_2)", "torch.exp(-log_variance_1)")]),
        ("normal_kl", "divides by the deviation", "divided by the variance, not the deviation", [
            ("torch.exp(-log_variance_2)", "torch.exp(-0.5 * log_variance_2)")]),
        ("normal_kl", "forgets the one half", "one half", [("0.5 * (", "1.0 * (")])],
    7: [("AttentionBlock.forward", "forgets 1/√d", "not divided by the root of a head's width", [
            ("attn_mask=mask[:, None, None])", "attn_mask=mask[:, None, None], scale=1.0)")]),
        ("AttentionBlock.forward", "divides by the root of all channels", "not of all channels", [
            ("attn_mask=mask[:, None, None])", "attn_mask=mask[:, None, None], scale=x.shape[1] ** -0.5)")]),
        ("AttentionBlock.forward", "hides what the mask allows", "what the mask hides", [("mask[:, None, "
            "None]", "~mask[:, None, None]")]),
        ("AttentionBlock.forward", "puts the context behind the picture", "what the mask hides", [
            ("torch.cat([context_k, k], 1), torch.cat([context_v, v], 1)", "torch.cat([k, context_k], 1), torch.cat([v, "
             "context_v], 1)")]),
        ("AttentionBlock.forward", "forgets the residual", "adds to x", [("return x + y", "return y")]),
        ("AttentionBlock.forward", "forgets the norm", "normalized first", [("self.norm(x)", "x")])],
    8: [("Decoder.inject", "puts the mask's new places at "
         "the end", "at the end", [("(self.config.z_i_tokens, 0)", "(0, self.config.z_i_tokens)")]),
        ("Decoder.inject", "cuts the tokens across", "run of text_width numbers", [
            (".unflatten(1, (self.config.z_i_tokens, -1))", ".unflatten(1, (-1, self.config.z_i_tokens)).transpose(1, 2)")]),
        ("Decoder.inject", "puts the tokens behind the caption", "come after z_i's "
         "tokens", [("[tokens, states]", "[states, tokens]")]),
        ("Decoder.inject", "replaces the embedding", "replaces", [("return emb + self", "return self")])],
    9: [("guided", "guides the wrong way round", "conditional prediction", [("free + guidance_scale * (given - "
        "free)", "given + guidance_scale * (free - given)")]),
        ("guided", "starts from the conditional prediction", "whose w is ours minus one", [
            ("    if guidance_scale == 1:", "    if guidance_scale is None:"),
            ("free + guidance_scale * (given - free)", "given + guidance_scale * (given - free)")]),
        ("guided", "forgets to drop the caption", "scale 0 must return the unconditional prediction", [
            ("{k: torch.cat([v, null[k].expand_as(v)]) for k, v in text.items()}", "{k: torch.cat([v, v]) for k, v in "
             "text.items()}")])],
    10: [("decoder_loss", "forgets the T of the bound", "multiplied by T", [("0.001 * T * vlb.mean()", "0.001 * vlb.mean()")]),
         ("decoder_loss", "lets the bound train ε", "goes into it detached", [("eps.detach()", "eps")]),
         ("decoder_loss", "tosses one coin for both", "independently", [("torch.rand(2, generator=g)", "torch.rand(1, generator=g).expand(2)")]),
         ("decoder_loss", "swaps the two shares", "10% of the time and the caption 50%", [
             ("dice[:, :1] < drop_z_i", "dice[:, :1] < drop_caption"), ("dice[:, 1] < drop_caption", "dice[:, 1] < drop_z_i")]),
         ("decoder_loss", "draws one timestep for all", "drawn evenly", [
             ("torch.rand((), generator=g)", "torch.rand((), generator=generators[0].manual_seed(0))")]),
         ("decoder_loss", "draws all timesteps alike whatever time_power says", "two thirds of T", [("u ** time_power", "u")]),
         ("decoder_loss", "lets torch's own numbers decide", "from its generators", [
             ("torch.rand((), generator=g)", "torch.rand(())")])],
    11: [("ddim_step", "returns the variance", "that is the variance", [
            ("eta * math.sqrt((1 - alpha_s) / (1 - alpha_t) * (1 - alpha_t / alpha_s))\n",
             "eta * ((1 - alpha_s) / (1 - alpha_t) * (1 - alpha_t / alpha_s))\n")]),
         ("ddim_step", "keeps all of ε and adds noise", "comes on top", [("1 - alpha_s - deviation ** 2", "1 - alpha_s")]),
         ("ddim_step", "takes the wrong ᾱ for ε", "puts x_0 and ε together again", [("math.sqrt(1 - alpha_s - deviation "
             "** 2)", "math.sqrt(1 - alpha_t - deviation ** 2)")]),
         ("ddim_step", "subtracts the deviation", "the variance is subtracted", [("- deviation ** 2", "- deviation")])],
    12: [("gaussian_blur", "forgets the 2 of 2σ²", "factor 2", [("(2 * sigma ** 2)", "sigma ** 2")]),
         ("gaussian_blur", "pads with zeros", "filled with zeros", [('(1, 1, 1, 1), "reflect"', '(1, 1, 1, 1), "constant"')]),
         ("gaussian_blur", "does not normalize the kernel", "sum to 1", [("(kernel / kernel.sum())", "kernel")]),
         ("training_crops", "crops first and damages the crop", "damaged whole and then cropped", [
             ("        damaged, chosen = small,", "        x, y = rng.integers(config.low_size - side + 1, size=2).tolist()\n"
              "        box = (x, y, x + side, y + side)\n        damaged, chosen = small.crop(box),"),
             ("bsr_degrade(small, rng)", "bsr_degrade(damaged, rng)"), ("to_tensor(small)[None]", "to_tensor(damaged)[None]"),
             ("        box = max(boxes, key=lambda box: np.asarray(small.crop(box)).std())\n", ""),
             ("lows.append(to_tensor(damaged.crop(box)))", "lows.append(to_tensor(damaged))")]),
         ("training_crops", "cuts the high crop off the grid", "begin on the low-resolution grid", [
             ("factor * place for place", "factor * place + 1 for place")]),
         ("training_crops", "keeps the first of several crops", "the one that varies most", [
             ("max(boxes, key=lambda box: np.asarray(small.crop(box)).std())", "boxes[0]")]),
         ("training_crops", "never reaches the border", "last rows and columns", [("config.low_size - "
             "side + 1", "config.low_size - side")])],
    13: [("DiffusionPrior.sequence", "is off by one", "off by one", [(".tril()", ".tril(-1)")]),
         ("DiffusionPrior.sequence", "lets each place see the next", "no place may look at a "
          "later one", [(".tril()", ".tril(1)")]),
         ("DiffusionPrior.sequence", "masks the last four with the padding", "only the caption is "
          "padded", [("value=True", "value=False")]),
         ("DiffusionPrior.sequence", "counts the last places from the start", "counted from the end", [
             ("self.positional_embedding[-4:]", "self.positional_embedding[L:L + 4]")]),
         ("DiffusionPrior.sequence", "forgets √d", "multiply by √d", [("(math.sqrt(c.embed_dim) if c.unit_norm else 1)", "1")])],
    14: [("prior_loss", "predicts the noise", "predicts z_i, not the noise", [
            ("        z_i_t = q_sample(z_0, t, randn(generators, z_i.shape, z_i.device), alphas_cumprod)",
             "        noise = randn(generators, z_i.shape, z_i.device)\n        z_i_t = q_sample(z_0, t, noise, alphas_cumprod)"),
            ("text, cache), z_0)", "text, cache), noise)")]),
         ("prior_loss", "forgets to standardize", "are standardized", [("z_0 = model.standardize(z_i)", "z_0 = z_i")]),
         ("prior_loss", "compares with z_i as they come", "z_i as they come", [("text, cache), z_0)", "text, cache), z_i)")]),
         ("prior_loss", "sums over the draws", "mean over the draws", [("return total / draws", "return total")]),
         ("prior_loss", "draws one timestep for all draws", "a timestep and noise of its own", [
             ("    for _ in range(draws):\n        t = torch.cat([torch.randint(1000, (1,), generator=g) for g in generators]).to(z_i.device)",
              "    t = torch.cat([torch.randint(1000, (1,), generator=g) for g in generators]).to(z_i.device)\n    for _ in range(draws):")]),
         ("estimate_errors", "keeps the last batch alone", "last batch alone", [("        z_0, "
             "cache =", "        errors.clear()\n        z_0, cache =")]),
         ("estimate_errors", "takes the root", "squared error is asked for", [
             ("F.mse_loss(model(z_i_t, t, text, cache), z_0)", "F.l1_loss(model(z_i_t, t, text, cache), z_0)")])],
    15: [("pca", "leaves the eigenvalues ascending", "ascending", [("return mean, vectors.T.flip(0), "
                                                                    "variances.flip(0)", "return mean, vectors.T, variances")]),
         ("pca", "leaves the components in columns", "stand in columns", [("vectors.T.flip(0), variances", "vectors.flip(1), "
             "variances")]),
         ("pca", "forgets that the batches' means differ", "that is variance too", [(" + n * share * "
             "torch.outer(off, off)", "")]),
         ("pca", "does not subtract the mean", "subtract the mean first", [
             ("centred.T @ centred + n * share * torch.outer(off, off)", "z.T @ z")]),
         ("pca", "divides by n − 1", "not n − 1", [("scatter / n", "scatter / (n - 1)")])],
    16: [("quantile_buckets", "makes the buckets equally wide", "not equally wide", [
            ("    return quantiles[..., 1::2].contiguous(), quantiles[..., ::2].contiguous()",
             "    low, high = values[..., :1], values[..., -1:]\n    quantiles = low + (high - low) * torch.arange(1, 2 * "
             "buckets) / (2 * buckets)\n"
             "    return quantiles[..., 1::2].contiguous(), quantiles[..., ::2].contiguous()")]),
         ("quantile_buckets", "takes the edges' middles for centres", "median", [
            ("quantiles[..., ::2].contiguous()", "torch.cat([values[..., :1], (quantiles[..., 1:-2:2] + quantiles[..., 3::2]) "
             "/ 2, values[..., -1:]], -1)")]),
         ("fit_codes", "keeps one component "
          "too many", "the fewest components", [("nonzero().min()) + 1", "nonzero().min()) + 2")]),
         ("fit_codes", "forgets the mean", "less the mean", [("(some - mean)", "some")]),
         ("ARPrior.encode", "forgets the mean", "subtract the mean", [("(z_i - self.mean)", "z_i")]),
         ("ARPrior.decode", "forgets the mean", "added back", [(" + self.mean", "")]),
         ("ARPrior.decode", "forgets to normalize", "renormalize", [("F.normalize(values @ self.components + self.mean, "
                                                                     "dim=-1)", "values @ self.components + self.mean")])],
    17: [("invert", "starts from the picture itself", "not from x_0 itself", [
            ("q_sample(x_0, bottom, randn(generators, x_0.shape, x_0.device), alphas_cumprod)", "x_0")]),
         ("invert", "goes down the "
          "ladder", "begins at the top", [("inversion_ladder(steps)\n", "inversion_ladder(steps)[::-1]\n")]),
         ("invert", "moves along the ε of the rung below", "belongs to another x and t", [
            ("        eps, _ = guided(model, climb(eps), t, z_i, text, None, 1)\n        x, alpha_s = climb(eps), alpha_t",
             "        x, alpha_s = climb(eps), alpha_t\n        eps, _ = guided(model, x, t, z_i, text, None, 1)")]),
         ("invert", "never moves its ᾱ_s on", "moves along ε", [("x, alpha_s = climb(eps), alpha_t", "x = climb(eps)")])],
    18: [("slerp", "goes straight", "straight line", [("torch.where(angle < 1e-9, u, arc) * size",
                                                      "(1 - theta) * size_u * u + theta * size_v * v")]),
         ("slerp", "goes straight and normalizes", "faster in the middle", [
            ("torch.where(angle < 1e-9, u, arc) *", "F.normalize((1 - theta) * u + theta * v, dim=1) *")]),
         ("slerp", "does not put the length back", "length is put back", [("arc) * size)", "arc))")]),
         ("slerp", "divides by sin 0", "division by sin 0", [("torch.where(angle < 1e-9, u, arc)", "arc")])],
    19: [("text_diff", "subtracts the wrong way round", "less the picture's own", [("z_t(to) - z_t(source)", "z_t(source) - z_t(to)")]),
         ("text_diff", "does not normalize the difference", "z_d is to be normalized", [("F.normalize(z_d, dim=1) * "
             "z_i.norm(dim=1, keepdim=True)", "z_d")]),
         ("text_diff", "goes all the way", "θ ends at maximum", [("maximum * k / (frames - 1)", "k / (frames - 1)")]),
         ("text_diff", "walks back from z_d", "not back", [("slerp(z_i, z_d, maximum", "slerp(z_d, z_i, maximum")]),
         ("text_diff", "does not restore", "yours stays as slerp gives it", [("if restore:", "if False:")]),
         ("text_diff", "restores from z_θ to z_i", "z_i comes first", [("restored(stack, z_i, z)", "restored(stack, z, z_i)")]),
         ("text_diff", "always restores", "without `restore`", [("if restore:", "if True:")])],
    20: [("pca_reconstruct", "forgets the mean", "added back", [("mean + (z_i - mean)", "(z_i - mean)")]),
         ("pca_reconstruct", "projects without subtracting the mean", "before you project", [("(z_i - mean) @", "z_i @")]),
         ("pca_reconstruct", "normalizes", "not to be normalized", [
            ("mean + (z_i - mean) @ components[:k].T @ components[:k]", "F.normalize(mean + (z_i - mean) @ "
             "components[:k].T @ components[:k], dim=1)")])],
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

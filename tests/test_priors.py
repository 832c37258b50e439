"""Both priors of §2.2: codes that lose little, a cache that changes nothing, and the variance that few steps need."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prior
import priors
import sample
import train
from caption_accuracy import parse_caption, score
from clip_embed import UserError
from data import shapes
from data.embeddings import scale, standard

TINY = prior.ARConfig(embed_dim=8, clip_text_width=16, components=5, buckets=16, width=32, layers=2, heads=2)
ALPHAS = prior.cosine_schedule()


def generators(n, seed=0):
    return [torch.Generator().manual_seed(seed + k) for k in range(n)]


def embeddings(n, d=8, seed=0):
    """Unit vectors around a mean, some directions wider than others, in no axis' direction."""
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(9)))[0]
    return F.normalize(torch.randn(n, d, generator=g) * 0.6 ** torch.arange(d) @ turn.T + turn.sum(0), dim=1)


def tiny_prior(config=TINY):
    """An ARPrior with codes of embeddings(2000) and no branch at zero, in eval mode."""
    model = prior.ARPrior(config)
    z_i = embeddings(2000, config.embed_dim)
    mean, components, _ = (v.float() for v in prior.pca([z_i]))
    edges, centres = prior.quantile_buckets(((z_i - mean) @ components[:config.components].T).T, config.buckets)
    dot_edges, _ = prior.quantile_buckets(z_i[:, 0], config.buckets)
    model.load_state_dict({"mean": mean, "components": components[:config.components], "edges": edges, "centres": centres,
                           "dot_edges": dot_edges}, strict=False)
    for p in model.parameters():
        if not p.abs().sum():
            torch.nn.init.normal_(p, std=0.2)
    return model.eval().requires_grad_(False)


# ----------------------------------------------------------------------------- codes

def test_streamed_pca_equals_the_svd_of_the_whole():
    z = embeddings(1000).double() + 100  # far from zero: a sum of squares in one go would lose digits
    mean, components, variances = prior.pca(z.split([1, 400, 99, 500]))
    _, s, vectors = np.linalg.svd(z.numpy() - z.numpy().mean(0), full_matrices=False)
    assert np.allclose(mean, z.numpy().mean(0), rtol=1e-12)
    assert np.allclose(variances, s ** 2 / 1000, rtol=1e-8)
    assert np.allclose(np.abs((components.numpy() * vectors).sum(1)), 1, atol=1e-9)  # the same directions, up to sign


def test_buckets_are_equally_full_and_their_centres_are_medians():
    values = torch.randn(2, 20_000).double() ** 3
    edges, centres = prior.quantile_buckets(values, 32)
    codes = torch.searchsorted(edges, values)
    for row in range(2):
        assert (torch.bincount(codes[row], minlength=32) - 625).abs().max() <= 1
        assert all(abs(float(values[row][codes[row] == k].median() - centres[row, k])) < 0.02 for k in range(1, 31))
    assert (edges.diff() > 0).all() and (centres[:, 1:] > edges).all() and (centres[:, :-1] < edges).all()


def test_the_fewest_components_are_kept_that_lose_under_a_hundredth_of_the_variance():
    z = embeddings(5000, 32)
    codes = prior.fit_codes(z)
    model = prior.ARPrior(replace(TINY, embed_dim=32, components=len(codes["components"]), buckets=1024))
    model.load_state_dict(codes, strict=False)
    lost = []
    for kept in (model.config.components, model.config.components - 1):  # measured on z itself, before norms are put right
        values = model.centres[:kept].gather(1, model.encode(z).T[:kept]).T
        again = values @ model.components[:kept] + model.mean
        lost.append(float((z - again).square().sum() / (z - z.mean(0)).square().sum()))
    assert lost[0] < 0.01 <= lost[1]


def test_codes_come_back_near_z_i_with_unit_norm_and_every_code_stands_for_itself():
    z = embeddings(3000, 16)
    model = tiny_prior(replace(TINY, embed_dim=16, components=16, buckets=1024))
    again = model.decode(model.encode(z))
    assert torch.allclose(again.norm(dim=1), torch.ones(3000), atol=1e-6)
    assert float((again - z).square().sum(1).mean()) < 0.005 * float(z.var(0).sum())
    codes = torch.randint(1, 1023, (50, 16))
    values = model.centres.gather(1, codes.T).T
    assert torch.equal(model.encode(values @ model.components + model.mean), codes)


def test_half_precision_codes_are_as_good():
    z, model = embeddings(3000, 16), tiny_prior(replace(TINY, embed_dim=16, components=16, buckets=1024))
    half = prior.ARPrior(model.config)
    half.load_state_dict({k: v.half() for k, v in model.state_dict().items()})
    lost = [float((m.decode(m.encode(z)) - z).square().sum() / (z - z.mean(0)).square().sum()) for m in (model, half)]
    assert lost[1] < lost[0] + 1e-4


@pytest.mark.parametrize("spoil, message", [
    (lambda z: z[:7], "7 embeddings cannot give 8 components"),
    (lambda z: torch.where(torch.arange(8) == 3, torch.tensor(0.1), z), "coordinate 3 is the same in every embedding"),
    (lambda z: z.index_fill(0, torch.tensor([5]), float("nan")), "not finite"),
])
def test_embeddings_that_cannot_be_coded_are_named(spoil, message):
    with pytest.raises(ValueError, match=message):
        prior.fit_codes(spoil(embeddings(100)))


def test_too_few_buckets_are_named():
    with pytest.raises(ValueError, match="2 buckets lose .*% of the variance"):
        prior.fit_codes(embeddings(100), buckets=2)


@pytest.mark.parametrize("percentile", [-1, 101, math.nan])
def test_a_percentile_that_cannot_be_is_named(percentile, text):
    with pytest.raises(ValueError, match="must be between 0 and 100"):
        prior.draw_codes(tiny_prior(), text(B=1), text(B=1), generators(1), 1, percentile)


# ----------------------------------------------------------------------------- the autoregressive prior

def test_each_code_hears_those_before_it_and_the_caption_but_nothing_later_and_no_padding(text):
    model, tokens, y = tiny_prior(), torch.randint(16, (2, 5)), text(padding=2)
    out = model(tokens, y)
    for k in range(5):
        changed = model(tokens.index_add(1, torch.tensor([k]), torch.ones(2, 1, dtype=torch.long)) % 16, y)
        assert torch.allclose(changed[:, :k], out[:, :k], atol=1e-6)
        assert all(not torch.allclose(changed[:, j], out[:, j], atol=1e-4) for j in range(k, 5))
    states = y["states"].clone()
    states[:, 4:] = 9.0
    assert torch.allclose(model(tokens, y | {"states": states}), out, atol=1e-6)
    states[:, 3] += 1
    for said in ({"states": states}, {"z_t": y["z_t"] + 1}):
        assert not torch.allclose(model(tokens, y | said), out, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_with_and_without_the_cache_the_same_codes_are_drawn_from_the_same_random_numbers(guidance_scale, text):
    model = tiny_prior(replace(TINY, embed_dim=8, components=8, buckets=64)).double()
    to_double = lambda y: {k: v.double() if v.is_floating_point() else v for k, v in y.items()}
    y, null = to_double(text(B=16, padding=1)), to_double(text(B=1, padding=1))
    seen = {"with": [], "without": []}

    def cached(tokens, text, cache):
        assert tokens.shape[1] == 1  # a token a step
        seen["with"].append(model(tokens, text, cache))
        return seen["with"][-1]

    def forgetful(tokens, text, cache):  # the list holds the tokens, and everything is computed afresh
        cache.append(tokens)
        seen["without"].append(model(torch.cat(cache, 1), text)[:, -1:])
        return seen["without"][-1]

    cached.config = forgetful.config = model.config
    codes = [prior.draw_codes(f, y, null, generators(16), guidance_scale) for f in (cached, forgetful)]
    assert torch.equal(*codes) and codes[0].shape == (16, 8) and len(codes[0].unique()) > 30
    for a, b in zip(seen["with"], seen["without"], strict=True):
        assert a.dtype == torch.float32 and torch.allclose(a, b, atol=1e-5)


class Table:
    """Stands in for a network: logits by place alone, different where the caption is the null one (z_t = 0)."""

    def __init__(self, logits, null):
        self.logits, self.null, self.tokens = logits, null, []
        self.config = replace(TINY, components=len(logits), buckets=logits.shape[1])

    def __call__(self, tokens, text, cache):
        cache.append(0)
        self.tokens.append(tokens)
        said = text["z_t"].abs().sum(1) > 0
        return torch.where(said[:, None], self.logits[len(cache) - 1], self.null[len(cache) - 1])[:, None]


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 3.0])
def test_codes_are_drawn_with_the_probabilities_of_guided_logits(guidance_scale):
    n = 6000
    logits, null = torch.randn(2, 3, 6)
    y, nothing = {"z_t": torch.ones(n, 4)}, {"z_t": torch.zeros(1, 4)}
    codes = prior.draw_codes(Table(logits, null), y, nothing, generators(n), guidance_scale)
    for k in range(3):
        p = (null[k] * (1 - guidance_scale) + guidance_scale * logits[k]).exp()
        share = torch.bincount(codes[:, k], minlength=6) / n
        assert torch.allclose(share, p / p.sum(), atol=0.03)


@pytest.mark.parametrize("percentile", [0, 50, 95, 100])
def test_the_dot_product_is_drawn_from_above_the_percentile_of_the_training_distribution(percentile):
    """Through the edges: the bucket drawn, put back among the training values, lies in the part asked for, and evenly."""
    dots, n = torch.randn(50_000), 4000
    edges, centres = prior.quantile_buckets(dots, 1024)
    table = Table(torch.zeros(1, 1024), torch.zeros(1, 1024))
    prior.draw_codes(table, {"z_t": torch.ones(n, 4)}, {"z_t": torch.zeros(1, 4)}, generators(n), percentile=percentile)
    drawn = centres[table.tokens[0][:, 0]]
    floor = torch.quantile(dots, min(int(percentile / 100 * 1024), 1023) / 1024)  # to a whole bucket
    assert (drawn >= floor).all()
    assert float(drawn.median()) == pytest.approx(float(dots[dots >= floor].median()), abs=0.1)


def test_training_drops_the_caption_a_tenth_of_the_time_and_keeps_the_dot_product(text):
    model, n, seen = tiny_prior(), 5000, {}
    z_i = embeddings(n)
    y = {"states": torch.ones(n, 2, 16), "z_t": F.normalize(torch.randn(n, 8), dim=1), "mask": torch.ones(n, 2, dtype=torch.bool)}
    null = {"states": torch.zeros(1, 2, 16), "z_t": torch.zeros(1, 8), "mask": torch.ones(1, 2, dtype=torch.bool)}
    model.forward = lambda tokens, text: (seen.update(tokens=tokens, text=text), torch.zeros(n, 5, 16))[1]
    assert float(prior.ar_loss(model, z_i, y, null, generators(n))) == pytest.approx(math.log(16), rel=1e-5)
    dropped = seen["text"]["z_t"].abs().sum(1) == 0
    assert torch.equal(dropped, seen["text"]["states"].sum((1, 2)) == 0)
    assert float(dropped.float().mean()) == pytest.approx(0.1, abs=0.015)
    dot = sum(((z_i * y["z_t"]).sum(1) > edge).long() for edge in model.dot_edges)
    assert torch.equal(seen["tokens"][:, 0], dot) and torch.equal(seen["tokens"][:, 1:], model.encode(z_i)[:, :-1])


def test_the_autoregressive_prior_learns_codes_that_depend_on_the_caption_and_on_earlier_codes(text):
    """Two captions; the second code repeats the first, whose half of the buckets the caption decides: ln 8 nats, then 0."""
    model = tiny_prior(replace(TINY, components=2)).requires_grad_().train()
    both, n = text(B=2), 64
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(150):
        said = torch.randint(2, (n,))
        first = torch.randint(8, (n, 1)) + 8 * said[:, None]
        logits = model(torch.cat([torch.randint(16, (n, 1)), first], 1), {k: v[said] for k, v in both.items()})
        losses = [F.cross_entropy(logits[:, k], first[:, 0]) for k in range(2)]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    assert losses[0].item() == pytest.approx(math.log(8), abs=0.15) and losses[1].item() < 0.1


def test_the_paper_preset_has_table_3s_billion_parameters():
    with torch.device("meta"):
        model = prior.ARPrior(prior.AR_PRESETS["paper"])
    assert 0.9e9 <= sum(p.numel() for p in model.parameters()) <= 1.25e9
    assert model.config.components + 1 <= 384 and (model.config.width, model.config.layers, model.config.heads) == (1664, 24, 26)


# ----------------------------------------------------------------------------- the diffusion prior's variance

def test_standardized_embeddings_have_components_of_like_size_and_come_back():
    """Against numpy: whatever the components' sizes, those above the mean variance become nearly alike."""
    rng, d = np.random.default_rng(0), 16
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    sizes = np.array([1.0] * 8 + [0.3] * 4 + [0.001] * 4)
    z_i = torch.from_numpy(0.5 + rng.normal(size=(20_000, d)) * sizes @ turn).float()
    z_i = F.normalize(z_i, dim=1)
    model = prior.DiffusionPrior(prior.PriorConfig(embed_dim=d, clip_text_width=16, text_context=6, width=16, layers=1, heads=2))
    model.load_state_dict(standard(z_i, "shapes"), strict=False)
    z = model.standardize(z_i)
    assert float(z.square().mean()) == pytest.approx(17.2 ** 2 / 1024, rel=1e-3) and float(z.mean(0).abs().max()) < 1e-3
    covariance = np.cov(z.numpy().T)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-4
    variances = np.linalg.eigvalsh(np.cov(z_i.double().numpy().T))
    want = variances / (variances + variances.mean())
    assert np.diag(covariance) == pytest.approx(want * np.diag(covariance).sum() / want.sum(), rel=0.01, abs=1e-5)
    assert torch.allclose(model.embedding(z), z_i, atol=1e-5)
    lengths = model.embedding(z + torch.randn_like(z)).norm(dim=1)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-5)
    half = copy.deepcopy(model).bfloat16()  # as `train.py export` rounds its buffers
    assert torch.allclose(half.embedding(half.standardize(z_i)), z_i, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):  # in training
        assert torch.allclose(model.embedding(model.standardize(z_i)), z_i, atol=1e-5)
    alike = standard(z_i[:1].expand(64, d), "shapes")
    assert all(value.isfinite().all() for value in alike.values()) and (alike["deviation"] > 0).all()
    with pytest.raises(UserError, match="NaN or infinity"):
        standard(torch.full((64, d), math.nan), "shapes")


class GaussianPosterior:
    """The exact E[x_0|x_t] of x_0 ~ N(mean, s² I) at the diffusion's scale, standing in for a network."""

    def __init__(self, mean, s):
        self.mean, self.s = mean, s
        self.errors, self.config = self.exact(torch.arange(1000)).float(), prior.PriorConfig()

    def standardize(self, z_i):
        return z_i * scale(z_i.shape[1])

    def embedding(self, z):
        return F.normalize(z, dim=-1)

    def exact(self, t):
        """Var[x_0|x_t] a coordinate: what is left of s² once x_t, a measurement with noise (1 − ᾱ)/ᾱ, is known."""
        return 1 / (1 / self.s ** 2 + ALPHAS[t] / (1 - ALPHAS[t]))

    def __call__(self, x, t, text, cache=None):
        a = ALPHAS[t][:, None]
        return (self.mean + a.sqrt() * self.s ** 2 / (a * self.s ** 2 + 1 - a) * (x - a.sqrt() * self.mean)).float()


def test_estimated_errors_of_an_exact_denoiser_are_the_posterior_variance_at_every_t():
    d = 64
    model = GaussianPosterior(0.1, 0.4)
    z_i = [(0.1 + 0.4 * torch.randn(1000, d)) / scale(d) for _ in range(2)]
    errors = prior.estimate_errors(model, [(z, {}) for z in z_i], torch.Generator().manual_seed(0))
    assert errors.shape == (1000,) and torch.allclose(errors, model.exact(torch.arange(1000)).float(), rtol=0.03, atol=1e-4)


def test_several_draws_of_a_caption_are_the_mean_of_single_ones_with_their_gradients(text):
    """The cached places before t against the whole sequence, computed for each draw."""
    torch.manual_seed(1)
    model = prior.DiffusionPrior(prior.PriorConfig(embed_dim=8, clip_text_width=16, text_context=6, width=16, layers=2, heads=2))
    z_i, y, null = F.normalize(torch.randn(3, 8), dim=1), text(B=3, padding=2), text(B=1)
    whole = torch.autograd.grad(prior.prior_loss(model, z_i, y, null, generators(3), 0.5, draws=4), [*model.parameters()])
    together, noises, z_0 = generators(3), [], z_i * scale(8)
    drop = torch.cat([torch.rand(1, generator=g) for g in together]) < 0.5
    assert drop.any() and not drop.all()
    losses = []
    for _ in range(4):
        t = torch.cat([torch.randint(1000, (1,), generator=g) for g in together])
        noises.append(torch.stack([torch.randn(8, generator=g) for g in together]))
        out = model(prior.q_sample(z_0, t, noises[-1], ALPHAS), t, prior.drop_text(y, null, drop))
        losses.append(((out - z_0) ** 2).mean())
    apart = torch.autograd.grad(sum(losses) / 4, [*model.parameters()])
    assert not torch.equal(noises[0], noises[1])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, apart)) and any(g.abs().max() > 1e-3 for g in apart)


@pytest.mark.parametrize("spread", [0.1, 0.4, 1.0])
def test_surprise_of_an_exact_denoiser_is_one_for_its_own_data_and_has_its_closed_form_for_others(spread):
    """x_0 of variance v around the mean that N(mean, s²) expects: the mean error is (v r² + q)/(r + q)², r and q the two precisions."""
    model, d = GaussianPosterior(0.1, 0.4), 512
    t = torch.linspace(0, 999, 32).round().long()
    r, q = 1 / model.s ** 2, ALPHAS[t] / (1 - ALPHAS[t])
    want = float(((spread ** 2 * r ** 2 + q) / (r + q)).mean())
    z_i = (0.1 + spread * torch.randn(400, d)) / scale(d)
    found = sample.surprise(model, z_i, {})
    assert found.shape == (400,) and float(found.mean()) == pytest.approx(want, rel=0.03)
    assert spread != 0.4 or float(found.mean()) == pytest.approx(1, rel=0.03)
    assert torch.allclose(sample.surprise(model, z_i[7:8], {}), found[7:8])  # of its own, whatever else is in the batch


def test_surprise_tells_which_caption_an_embedding_is_of_as_bayes_rule_does():
    """Two captions, two Gaussians of one width: the likelier is the one whose mean is nearer."""
    d, s, n = 64, 0.4, 2000
    means = torch.stack([torch.zeros(d), 0.5 * torch.nn.functional.normalize(torch.randn(d), dim=0)])
    z_0 = means[torch.randint(2, (n,))] + s * torch.randn(n, d)
    surprises = torch.stack([sample.surprise(GaussianPosterior(mean, s), z_0 / scale(d), {}) for mean in means])
    logs = -(z_0 - means[:, None]).square().sum(2) / (2 * s ** 2)
    sure = (logs[0] - logs[1]).abs() > 1  # elsewhere the noise of 32 timesteps may decide
    assert sure.sum() > 300 and (surprises.argmin(0) == logs.argmax(0))[sure].float().mean() > 0.97


def variances_seen(variance, steps, model, n=4000, d=4):
    """Of each step of prior.sample from t to s: (t, s, variance of z_s around the mean that the step should have)."""
    calls = []

    class Spy(GaussianPosterior):
        def __call__(self, x, t, text, cache=None):
            calls.append((int(t[0]), x.double(), super().__call__(x, t, text).double()))
            return calls[-1][2].float()

    spy = Spy(model.mean, model.s)
    spy.errors *= variance == "analytic"
    y = {"z_t": torch.zeros(n, d)}
    prior.sample(spy, y, {"z_t": torch.zeros(1, d)}, generators(n), steps=steps, candidates=1)
    return calls


def test_the_analytic_variance_is_the_true_variance_of_the_reverse_step():
    """For Gaussian data q(x_s|x_t) is Gaussian: its variance from the joint covariance of (x_t, x_s), by conditioning."""
    model = GaussianPosterior(0.2, 0.5)
    calls = variances_seen("analytic", 5, model)
    for (t, x_t, _), (s, x_s, _) in zip(calls, calls[1:]):
        a_t, a_s = float(ALPHAS[t]), float(ALPHAS[s])
        var_t, var_s = (a * model.s ** 2 + 1 - a for a in (a_t, a_s))
        cov = math.sqrt(a_t / a_s) * var_s  # x_t = √(ᾱ_t/ᾱ_s) x_s + noise of its own
        mean = math.sqrt(a_s) * model.mean + cov / var_t * (x_t - math.sqrt(a_t) * model.mean)
        assert float((x_s - mean).square().mean()) == pytest.approx(var_s - cov ** 2 / var_t, rel=0.04)
        assert float((x_s - mean).mean()) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("steps", [3, 10])
def test_few_analytic_steps_keep_the_datas_variance_and_fixed_small_ones_lose_it(steps):
    """What enters the last call is x_0 at t = 0, where hardly any noise is left: its variance against ᾱ s² + 1 − ᾱ."""
    model = GaussianPosterior(0.2, 0.5)
    want = float(ALPHAS[0]) * model.s ** 2 + 1 - float(ALPHAS[0])
    got = {v: float(variances_seen(v, steps, model)[-1][1].var()) for v in ("analytic", "fixed-small")}
    assert got["analytic"] == pytest.approx(want, rel=0.04)
    assert got["fixed-small"] < {3: 0.6, 10: 0.9}[steps] * want


def test_a_sampler_with_a_cache_gives_what_it_gives_without(text):
    """The caption's places see neither t nor z_i, so their keys and values may be kept."""
    model = prior.DiffusionPrior(prior.PriorConfig(embed_dim=8, clip_text_width=16, width=32, layers=2, heads=2)).eval()
    y, null = text(B=3, padding=2), text(B=1, padding=1)
    for guidance_scale in (1.0, 2.0):
        a = prior.sample(model, y, null, generators(3), guidance_scale, 5)
        forgetful = lambda z, t, text, cache: model(z, t, text)
        forgetful.errors, forgetful.config, forgetful.embedding = model.errors, model.config, model.embedding
        assert torch.allclose(a, prior.sample(forgetful, y, null, generators(3), guidance_scale, 5), atol=1e-5)


# ----------------------------------------------------------------------------- the measurement, experiments/priors.py

def test_frechet_distance_of_gaussians_with_known_means_and_covariances():
    z = torch.randn(500, 6).double()
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T  # mean 0, covariance the identity, exactly
    stretch, shift = torch.tensor([0.5, 1, 2, 3, 1, 0.1]).double(), torch.arange(6).double()
    turn = torch.linalg.qr(torch.randn(6, 6).double())[0]
    want = float((1 - stretch).square().sum() + shift.square().sum())  # of independent coordinates, one at a time
    assert priors.frechet(z @ turn, (z * stretch + shift) @ turn) == pytest.approx(want, rel=1e-9)
    assert priors.frechet(z, z) == pytest.approx(0, abs=1e-9)


def test_scenes_made_for_a_caption_fit_it_and_show_it_and_those_with_one_thing_changed_do_not_fit():
    rng = np.random.default_rng(0)
    for _ in range(100):
        scene = shapes.random_scene(rng)
        saying = shapes.attributes_in_caption(scene, rng)
        caption = shapes.describe(scene, saying, rng)
        said, k = parse_caption(caption), rng.integers(len(scene.things))
        again = priors.scene_of(said, rng)
        assert priors.fits(scene, said) and priors.fits(again, said) and again != scene
        assert all(score(shapes.render(again, 64), caption).values())  # read back from its pixels
        here = scene.things[k]
        other = replace(here, shape=next(s for s in shapes.SHAPES if s not in [t.shape for t in scene.things]))
        assert not priors.fits(replace(scene, things=tuple(other if t is here else t for t in scene.things)), said)
        assert "background" not in saying or not priors.fits(replace(scene, background="none"), said)


def test_spread_and_distances_of_known_clouds():
    true, mean = torch.randn(40, 500, 16), torch.randn(40, 1, 16)
    assert priors.off(torch.randn(40, 500, 16), true) == pytest.approx((1, (2 / 500) ** 0.5), rel=0.05)
    want = (4 + float(mean.square().sum(2).mean()) / 16) ** 0.5
    assert priors.off(2 * torch.randn(40, 500, 16) + mean, true)[0] == pytest.approx(want, rel=0.02)
    z = F.normalize(torch.randn(3, 50, 4), dim=2)
    pairs = [float((z[1, i] * z[1, j]).sum()) for i in range(50) for j in range(50) if i != j]
    assert float(priors.spread_out(z)[1]) == pytest.approx(1 - np.mean(pairs), abs=1e-5)

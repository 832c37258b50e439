"""The Gaussian diffusion of the stages, against closed forms, Bayes' rule, integration and Monte Carlo."""

import ast
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import decoder
import prior
import upsample
from data.embeddings import scale

ALPHAS = decoder.cosine_schedule()


def generators(n, seed=0):
    return [torch.Generator().manual_seed(seed + k) for k in range(n)]


def no_text(n):
    return {"z_t": torch.zeros(n, 4), "mask": torch.ones(n, 1, dtype=torch.bool)}


def test_cosine_schedule_is_its_closed_form_up_to_the_clipped_last_step():
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    for t in range(999):
        assert float(ALPHAS[t]) == pytest.approx(f((t + 1) / 1000) / f(0), rel=1e-9)
    assert float(ALPHAS[999]) == pytest.approx(2.43e-9, rel=0.01)
    assert float(ALPHAS[999] / ALPHAS[998]) == pytest.approx(0.001)


def test_linear_schedule_is_the_product_of_its_betas():
    product = 1.0
    for t, alpha in enumerate(upsample.linear_schedule().tolist()):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert alpha == pytest.approx(product, rel=1e-9)


def test_q_sample_has_the_mean_and_variance_of_the_forward_process():
    """Run the chain x_t = √(1−β) x_{t−1} + √β ε step by step and compare its moments with one q_sample."""
    n, x_0, last = 40_000, 0.7, 300
    x = torch.full((n,), x_0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), ALPHAS[:-1]])
    for t in range(last + 1):
        beta = float(1 - ALPHAS[t] / before[t])
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * torch.randn(n)
    y = decoder.q_sample(torch.full((n, 1), x_0), torch.full((n,), last), torch.randn(n, 1), ALPHAS)
    assert float(x.mean()) == pytest.approx(float(y.mean()), abs=0.02)
    assert float(x.var()) == pytest.approx(float(y.var()), rel=0.04)
    assert float(y.mean()) == pytest.approx(x_0 * float(ALPHAS[last]) ** 0.5, abs=0.015)


@pytest.mark.parametrize("t, s", [(1, 0), (500, 499), (900, 300), (999, 990), (40, 3)])
def test_posterior_matches_bayes_rule_on_a_grid(t, s):
    """q(x_s|x_t, x_0) ∝ q(x_t|x_s) q(x_s|x_0), normalized numerically."""
    a_t, a_s, x_0 = float(ALPHAS[t]), float(ALPHAS[s]), 0.6
    x_t = math.sqrt(a_t) * x_0 - 0.7 * math.sqrt(1 - a_t)
    width = 12 * math.sqrt(1 - a_s)
    x_s = torch.linspace(math.sqrt(a_s) * x_0 - width, math.sqrt(a_s) * x_0 + width, 400_001, dtype=torch.float64)
    step = a_t / a_s
    log_p = -(x_s - math.sqrt(a_s) * x_0) ** 2 / (2 * (1 - a_s)) - (x_t - math.sqrt(step) * x_s) ** 2 / (2 * (1 - step))
    p = torch.softmax(log_p, 0)
    mean = float((p * x_s).sum())
    variance = float((p * (x_s - mean) ** 2).sum())
    from_x_0, from_x_t, beta_tilde = decoder.posterior(a_t, a_s)
    assert from_x_0 * x_0 + from_x_t * x_t == pytest.approx(mean, rel=1e-6, abs=1e-8)
    assert beta_tilde == pytest.approx(variance, rel=1e-5)


def test_learned_variance_runs_from_beta_tilde_to_beta_of_the_stride():
    a_t, a_s = ALPHAS[600], ALPHAS[500]
    beta, beta_tilde = 1 - a_t / a_s, decoder.posterior(a_t, a_s)[2]
    ends = [float(decoder.learned_log_variance(torch.tensor(v), beta, beta_tilde).exp()) for v in (0.0, 1.0)]
    assert ends[0] == pytest.approx(float((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)), rel=1e-5)
    assert ends[1] == pytest.approx(float(1 - a_t / a_s), rel=1e-5)


def test_normal_kl_matches_monte_carlo():
    m1, v1, m2, v2 = 0.3, 0.5, -0.2, 0.9
    x = m1 + math.sqrt(v1) * torch.randn(400_000)
    log_p = lambda m, v: -(x - m) ** 2 / (2 * v) - 0.5 * math.log(2 * math.pi * v)
    estimate = float((log_p(m1, v1) - log_p(m2, v2)).mean())
    exact = float(decoder.normal_kl(*(torch.tensor(c) for c in (m1, math.log(v1), m2, math.log(v2)))))
    assert exact == pytest.approx(estimate, abs=0.005)


def test_vlb_term_matches_a_monte_carlo_kl_of_the_reverse_step():
    """One pixel: draw x_s from the true posterior and average log q − log p, with an eps that is off and a v between."""
    t, x_0, v, n = 2, torch.full((1, 1, 1, 1), 0.2), torch.full((1, 1, 1, 1), 0.3), 400_000
    noise = torch.full_like(x_0, 0.9)
    x_t = decoder.q_sample(x_0, torch.tensor([t]), noise, ALPHAS)
    eps = noise + 0.8
    a_t, a_s = float(ALPHAS[t]), float(ALPHAS[t - 1])
    from_x_0, from_x_t, beta_tilde = decoder.posterior(a_t, a_s)
    estimate = (float(x_t) - math.sqrt(1 - a_t) * float(eps)) / math.sqrt(a_t)
    q_mean, p_mean = (from_x_0 * x + from_x_t * float(x_t) for x in (0.2, estimate))
    p_variance = math.exp(0.3 * math.log(1 - a_t / a_s) + 0.7 * math.log(beta_tilde))
    x_s = q_mean + math.sqrt(beta_tilde) * torch.randn(n, dtype=torch.float64)
    log = lambda m, var: -(x_s - m) ** 2 / (2 * var) - 0.5 * math.log(var)
    bits = float((log(q_mean, beta_tilde) - log(p_mean, p_variance)).mean()) / math.log(2)
    term = decoder.vlb_term(x_0, x_t, torch.tensor([t]), eps, v, ALPHAS)
    assert float(term) == pytest.approx(bits, rel=0.02)


@pytest.mark.parametrize("mean, deviation", [(0.1, 0.05), (-0.97, 0.02), (0.99, 0.3)])
def test_discretized_likelihood_sums_to_one_over_the_256_values(mean, deviation):
    x = torch.arange(256).float() / 127.5 - 1
    log_p = decoder.discretized_log_likelihood(x, torch.tensor(mean), torch.tensor(2 * math.log(deviation)))
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-3)


class GaussianData:
    """The exact ε-predictor of pixels drawn from N(mean, deviation²), standing in for a network; v = 0, so the variance is β̃."""

    def __init__(self, mean, deviation, side=8):
        self.mean, self.deviation = mean, deviation
        self.config = decoder.DecoderConfig(image_size=side)
        self.alphas = ALPHAS

    def eps(self, x, t):
        a = self.alphas[t].view(-1, *[1] * (x.ndim - 1))  # float64: 1 − ᾱ is tiny at small t
        var = a * self.deviation ** 2 + 1 - a
        x_0 = self.mean + a.sqrt() * self.deviation ** 2 / var * (x - a.sqrt() * self.mean)
        return ((x - a.sqrt() * x_0) / (1 - a).sqrt()).float()

    def __call__(self, x, t, z_i, text):
        return self.eps(x, t), torch.zeros_like(x)


@pytest.mark.parametrize("eta", [None, 0.0, 1.0])
def test_sampling_a_gaussian_with_its_exact_denoiser_gives_its_mean_and_variance(eta):
    model = GaussianData(0.25, 0.2)
    x = decoder.sample(model, torch.zeros(300, 4), no_text(300), no_text(1), generators(300), 1, steps=200, eta=eta)
    assert float(x.mean()) == pytest.approx(0.25, abs=0.01)
    assert float(x.std()) == pytest.approx(0.2, rel=0.04)


@pytest.mark.parametrize("config", [{}, {"eta": 1.0}, {"eta": 1.0, "top_signal": 0.0, "float32": True}])
def test_upsampler_samples_a_gaussian_with_its_exact_denoiser(config):
    call = lambda x, t, low: GaussianData(-0.3, 0.15).eps(x, t)
    call.config = upsample.UpsamplerConfig(low_size=2, image_size=8, steps=500, **config)
    x = upsample.sample(call, torch.zeros(300, 3, 2, 2), generators(300))
    assert float(x.mean()) == pytest.approx(-0.3, abs=0.01)
    assert float(x.std()) == pytest.approx(0.15, rel=0.05)


def test_prior_samples_a_direction_with_its_exact_denoiser():
    """Embeddings spread around a unit vector m by N(0, s²): the samples' mean points along m, with the right spread."""
    d, s = 16, 0.2
    m = torch.nn.functional.normalize(torch.randn(d), dim=0)

    def model(z, t, text, cache):
        a = ALPHAS[t].float()[:, None]
        mean, var = m * scale(d), (s * scale(d)) ** 2
        return mean + a.sqrt() * var / (a * var + 1 - a) * (z - a.sqrt() * mean)

    n, model.config, model.embedding = 600, prior.PriorConfig(), lambda z: torch.nn.functional.normalize(z, dim=-1)
    model.errors = torch.zeros(1000)
    text = {"z_t": torch.zeros(n, d)}
    z_i = prior.sample(model, text, {"z_t": torch.zeros(1, d)}, generators(n), candidates=1, steps=500)
    want = torch.nn.functional.normalize(m + s * torch.randn(100_000, d), dim=1)
    assert torch.allclose(z_i.norm(dim=1), torch.ones(n), atol=1e-5)
    assert torch.allclose(z_i.mean(0), want.mean(0), atol=0.03)
    assert float(z_i.var(0).sum()) == pytest.approx(float(want.var(0).sum()), rel=0.08)


def test_prior_keeps_the_candidate_closer_to_z_t():
    d = 8
    model = lambda z, t, text, cache: z  # whatever the noise was
    model.config, model.embedding = prior.PriorConfig(), lambda z: torch.nn.functional.normalize(z, dim=-1)
    model_text = {"z_t": torch.nn.functional.normalize(torch.randn(5, d), dim=1)}
    null = {"z_t": torch.zeros(1, d)}
    one = prior.sample(model, model_text, null, generators(5), steps=1, candidates=1)
    noise = torch.stack([torch.randn(2, d, generator=g) for g in generators(5)])
    both = torch.nn.functional.normalize(noise, dim=2)
    dots = (both * model_text["z_t"][:, None]).sum(2)
    want = both[torch.arange(5), dots.argmax(1)]
    assert torch.allclose(prior.sample(model, model_text, null, generators(5), steps=1), want)
    assert one.shape == want.shape


def test_ddim_with_eta_1_has_the_posterior_variance():
    """The paper's σ_t at η = 1 is √β̃_t, and the sampler's step really has that spread."""
    rungs = decoder.inversion_ladder(2)
    a_t, a_s = ALPHAS[rungs[1]], ALPHAS[rungs[0]]
    sigma = ((1 - a_s) / (1 - a_t)).sqrt() * (1 - a_t / a_s).sqrt()
    assert float(sigma ** 2) == pytest.approx(float(decoder.posterior(a_t, a_s)[2]), rel=1e-9)
    seen = []

    class Spy(GaussianData):
        def __call__(self, x, t, z_i, text):
            seen.append(x.clone())
            return super().__call__(x, t, z_i, text)

    x_T = torch.zeros(64, 3, 32, 32)
    decoder.sample(Spy(0.0, 0.5, 32), torch.zeros(64, 4), no_text(64), no_text(1), generators(64), 1, 2, eta=1.0, x_T=x_T)
    assert float(seen[1].std()) == pytest.approx(float(sigma), rel=0.01)  # from x_T = 0 the mean is 0: all spread is σ


class FlatData:
    """A denoiser that knows its data: every pixel is +c or −c. E[x_0|x_t] = c tanh(c √ᾱ x_t / (1 − ᾱ)), by Bayes' rule."""

    def __init__(self, c, side=8):
        self.c, self.config = c, decoder.DecoderConfig(image_size=side)

    def __call__(self, x, t, z_i, text):
        a = ALPHAS[t].view(-1, 1, 1, 1)
        x_0 = self.c * torch.tanh(self.c * a.sqrt() * x / (1 - a))
        return ((x - a.sqrt() * x_0) / (1 - a).sqrt()).float(), torch.full_like(x, 0.5)


def there_and_back(model, x_0, steps):
    """x_0 → x_T → x_0 again."""
    n = len(x_0)
    x_T = decoder.invert(model, x_0, torch.zeros(n, 4), no_text(n), generators(n, 100), steps=steps)
    return x_T, decoder.sample(model, torch.zeros(n, 4), no_text(n), no_text(1), None, 1, steps, eta=0, x_T=x_T, clamp=False)


def test_ddim_with_eta_0_draws_nothing_and_inversion_undoes_it():
    """Up to what noise of 0.04 hides in pictures as rough as these; half the range is 1, so that is 34 dB."""
    x_0 = 0.2 + 0.4 * torch.randn(2, 3, 8, 8)
    x_T, back = there_and_back(GaussianData(0.2, 0.4), x_0, 50)
    assert float((back - x_0.clamp(-1, 1)).square().mean().sqrt()) < 0.05
    assert float(x_T.std()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("steps, least", [(50, 60), (250, 60)])
def test_flat_pictures_become_noise_of_variance_1_and_come_back(steps, least, monkeypatch):
    x_0 = 0.5 * torch.randn(4, 3, 32, 32).sign()
    x_T, back = there_and_back(FlatData(0.5, 32), x_0, steps)
    assert -10 * math.log10(float(((back - x_0) / 2).square().mean())) > least
    assert float(x_T.mean()) == pytest.approx(0, abs=0.05) and float(x_T.var()) == pytest.approx(1, abs=0.05)
    monkeypatch.setattr(decoder, "randn", lambda generators, shape, device: torch.zeros(shape))
    x_T, _ = there_and_back(FlatData(0.5, 32), x_0, steps)  # without the noise of the lowest rung: the values stay two
    assert float(x_T.abs().std()) < 0.1


def test_an_inversion_climbs_from_a_little_noise_to_the_top_step():
    rungs = decoder.inversion_ladder(50)
    assert (len(set(rungs)), rungs[-1]) == (50, decoder.top_step(ALPHAS)) and rungs == sorted(rungs)
    assert float((1 - ALPHAS[rungs[0]]).sqrt()) >= 0.04 > float((1 - ALPHAS[rungs[0] - 1]).sqrt())
    with pytest.raises(ValueError, match="between 1 and"):
        decoder.inversion_ladder(999)


def test_guidance_1_is_no_guidance_and_0_ignores_the_condition():
    class Conditional(GaussianData):
        def __call__(self, x, t, z_i, text):
            return self.eps(x, t) + z_i.sum(1)[:, None, None, None], torch.full_like(x, 0.5)

    model, x, z_i = Conditional(0.1, 0.3), torch.randn(3, 3, 8, 8), torch.randn(3, 4)
    t = torch.full((3,), 500)
    given, free = model(x, t, z_i, None)[0], model(x, t, 0 * z_i, None)[0]
    results = {w: decoder.guided(model, x, 500, z_i, no_text(3), no_text(1), w)[0] for w in (0, 1, 1 + 1e-7, 3)}
    assert torch.equal(results[1], given)
    assert torch.allclose(results[1 + 1e-7], given, atol=1e-5)
    assert torch.allclose(results[0], free, atol=1e-6)
    assert torch.allclose(results[3], free + 3 * (given - free), atol=1e-5)


def test_guided_eps_of_a_linear_gaussian_toy_is_the_guided_score_at_every_t():
    """p(x_0) = N(0, 1), p(x_0|c) = N(c, s²): ε_w = −√(1−ᾱ) ∇ [log p(x_t) + w (log p(x_t|c) − log p(x_t))], by autograd."""
    c, s, w = 0.6, 0.3, 2.5

    def model(x, t, z_i, text):
        given = (z_i[:, :1, None, None] != 0).expand_as(x)
        eps = torch.where(given, GaussianData(c, s).eps(x, t), GaussianData(0.0, 1.0).eps(x, t))
        return eps, torch.zeros_like(x)

    for t in range(1000):
        x = torch.linspace(-2, 2, 12).view(1, 3, 2, 2).double().requires_grad_()
        a = ALPHAS[t]
        log_p = lambda mean, var: -(x - a.sqrt() * mean) ** 2 / (2 * (a * var + 1 - a))
        score, = torch.autograd.grad((log_p(0, 1) + w * (log_p(c, s * s) - log_p(0, 1))).sum(), x)
        eps, _ = decoder.guided(model, x.detach().float(), t, torch.ones(1, 4), no_text(1), no_text(1), w)
        assert torch.allclose(eps, (-(1 - a).sqrt() * score).float(), rtol=1e-3, atol=2e-4), t


def test_velocity_and_residual_networks_hand_out_the_eps_they_mean():
    x_0, eps, low, t = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4), torch.tensor([0, 100, 500, 900, 998])
    x_t, a = decoder.q_sample(x_0, t, eps, ALPHAS), decoder.at(ALPHAS, t, x_0)
    velocity = a.sqrt() * eps - (1 - a).sqrt() * x_0
    assert torch.allclose(decoder.eps_from_velocity(x_t, velocity, a), eps, atol=1e-4)
    # a residual network that hands out nothing but what is missing to x_0
    R, variance = upsample.RESIDUAL, 1 / a - 1
    output = torch.randn(5, 8, 4, 4)
    share = R ** 2 * output[:, 3:4].exp() / (R ** 2 * output[:, 3:4].exp() + variance)
    missing = (x_0 - low - share * (x_t / a.sqrt() - low)) / (variance * R ** 2 / (variance + R ** 2)).sqrt()
    output[:, :3] = missing - output[:, 4:7] / (1 + (-4 * output[:, 7:]).exp())
    assert torch.allclose(upsample.eps_from_residual(x_t, low, output, a), eps, atol=5e-3)


def test_a_residual_is_one_colour_or_the_other_with_its_switch_shut_or_open():
    x_t, low, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([30, 700])
    A, a, B = torch.randn(2, 3, 4, 4), torch.randn(2, 1, 4, 4), torch.randn(2, 3, 4, 4)
    alpha_t, nothing = upsample.at(ALPHAS, t, x_t), torch.zeros(2, 1, 4, 4)
    eps = lambda A, B, g: upsample.eps_from_residual(x_t, low, torch.cat([A, a, B, g], 1), alpha_t)
    assert torch.allclose(eps(A, B, nothing - 9), eps(A, 0 * B, nothing), atol=1e-5)
    assert torch.allclose(eps(A, B, nothing + 9), eps(A + B, 0 * B, nothing), atol=1e-5)


def test_where_noise_is_strong_a_residual_network_does_not_see_it():
    """Its answer at t = 990 differs by less than a thousandth between two noises, at t = 20 by far more."""
    model = upsample.Upsampler(replace(upsample.PRESETS["shapes"][1024], channels=8)).eval()
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn(p.shape))  # no branch starts as nothing
    low, heard = torch.randn(1, 3, 16, 16), []
    model.conv_out.register_forward_hook(lambda module, inputs, output: heard.append(output.detach()))
    for t in (20, 990):
        for _ in range(2):
            model(torch.randn(1, 3, 64, 64), torch.tensor([t]), low)
    change = [float((heard[k] - heard[k + 1]).abs().mean() / heard[k].abs().mean()) for k in (0, 2)]
    assert change[1] < 1e-3 < 0.01 < change[0], change


@pytest.mark.parametrize("log_variance", [-3.0, 0.0, 2.0])
def test_a_residual_is_shrunk_as_bayes_rule_shrinks_it(log_variance):
    """The posterior mean of a Gaussian residual given its noisy self, by numerical integration over its values."""
    v = upsample.RESIDUAL ** 2 * math.exp(log_variance)
    low, t = torch.zeros(6, 3, 1, 1).double(), torch.tensor([5, 40, 150, 400, 700, 950])
    a = upsample.at(ALPHAS, t, low).double()
    x_t = (a * v + 1 - a).sqrt() * torch.randn(6, 3, 1, 1).double()
    output = torch.zeros(6, 8, 1, 1).double()
    output[:, 3] = log_variance
    x_0 = (x_t - (1 - a).sqrt() * upsample.eps_from_residual(x_t, low, output, a)) / a.sqrt()
    d = torch.linspace(-12, 12, 40001).double() * v ** 0.5
    log_p = -d ** 2 / (2 * v) - (x_t - a.sqrt() * d) ** 2 / (2 * (1 - a))
    weight = (log_p - log_p.amax(-1, keepdim=True)).exp()
    assert torch.allclose(x_0[..., 0], (weight * d).sum(-1) / weight.sum(-1), rtol=1e-4, atol=1e-7)


def test_timesteps_come_as_often_as_time_power_says():
    """t / T = u^p: the share of t below s is s^(1/p)."""
    seen, n = [], 20_000
    model = lambda x, t, *rest: (seen.append(t), torch.zeros_like(x))[1]
    model.config = SimpleNamespace(schedule="linear", prediction="eps")
    for power in (1.0, 3.0):
        upsample.upsampler_loss(model, torch.zeros(n, 3, 1, 1), None, generators(n), time_power=power)
        for s in (0.1, 0.5, 0.9):
            assert float((seen[-1] < 1000 * s).float().mean()) == pytest.approx(s ** (1 / power), abs=0.012)


def test_a_ladder_is_denser_where_its_power_says():
    for power in (0.6, 1.0, 2.0):
        rungs = decoder.ladder(10, 990, power)
        assert rungs == [round(990 * (k / 9) ** power) for k in range(10)]
    assert decoder.ladder(900, 990, 0.5)[-3:] == [988, 989, 990]  # equal rungs are left out


def test_the_bound_trains_only_the_variance_and_weighs_a_thousandth_of_all_its_terms():
    eps, v = torch.randn(4, 3, 4, 4, requires_grad=True), torch.rand(4, 3, 4, 4, requires_grad=True)
    model = lambda x, t, z_i, text: (eps, v)
    model.config = SimpleNamespace(prediction="eps")
    x_0 = torch.rand(4, 3, 4, 4) * 2 - 1
    t = torch.cat([(1000 * torch.rand(1, generator=g)).long() for g in generators(4)])
    noise = torch.stack([(torch.rand(1, generator=g), torch.randn(3, 4, 4, generator=g))[1] for g in generators(4)])
    loss = decoder.decoder_loss(model, x_0, torch.zeros(4, 4), no_text(4), no_text(1), generators(4))
    simple = ((eps - noise) ** 2).mean()
    assert torch.allclose(torch.autograd.grad(loss, eps, retain_graph=True)[0], torch.autograd.grad(simple, eps)[0])
    bound = decoder.vlb_term(x_0, decoder.q_sample(x_0, t, noise, ALPHAS), t, eps, v, ALPHAS).mean()
    assert float((loss - simple).detach()) == pytest.approx(0.001 * 1000 * float(bound.detach()), rel=1e-4)
    assert torch.autograd.grad(loss, v)[0].abs().sum() > 0


@pytest.mark.parametrize("power", [0.3, 0.5, 1.0, 2.0])
def test_no_timestep_lies_past_the_last(power, monkeypatch):
    """The largest number that torch draws is 1 − 2⁻²⁴. Its square root is 1 in float32."""
    monkeypatch.setattr(torch, "rand", lambda *shape, generator=None: torch.full(() if shape == ((),) else shape, 1 - 2 ** -24))
    eps, v, seen = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5), []
    model = lambda x, t, z_i, text: (seen.append(t), (eps, v))[1]
    model.config = SimpleNamespace(prediction="eps")
    assert decoder.decoder_loss(model, eps, torch.zeros(2, 4), no_text(2), no_text(1), generators(2), time_power=power).isfinite()
    assert seen[0].tolist() == [999, 999]


def test_z_i_is_dropped_a_tenth_and_the_caption_half_of_the_time_independently():
    seen, n = {}, 20_000

    def model(x, t, z_i, text):
        seen["z_i"], seen["caption"] = z_i[:, 0] == 0, text["z_t"][:, 0] == 0
        return torch.zeros_like(x), torch.full_like(x, 0.5)

    model.config = SimpleNamespace(prediction="eps")
    text = no_text(n) | {"z_t": torch.ones(n, 4)}
    decoder.decoder_loss(model, torch.zeros(n, 1, 1, 1), torch.ones(n, 4), text, no_text(1), generators(n))
    share = lambda rows: float(rows.float().mean())
    assert share(seen["z_i"]) == pytest.approx(0.1, abs=0.01) and share(seen["caption"]) == pytest.approx(0.5, abs=0.015)
    assert share(seen["z_i"] & ~seen["caption"]) == pytest.approx(0.05, abs=0.006)
    f = lambda z, t, text, cache: (seen.update(prior=text["z_t"][:, 0] == 0), z)[1]
    f.standardize = lambda z_i: z_i
    prior.prior_loss(f, torch.ones(n, 4), text, no_text(1), generators(n))
    assert share(seen["prior"]) == pytest.approx(0.1, abs=0.01)


def test_fresh_noise_may_take_every_step_that_there_is_more_than_an_inversion_has():
    visited = []
    model = lambda x, t, z_i, text: (visited.append(int(t[0])), (torch.zeros_like(x), torch.zeros_like(x)))[1]
    model.config = decoder.DecoderConfig(image_size=2)
    steps = decoder.top_step(ALPHAS) + 1
    decoder.sample(model, torch.zeros(1, 4), no_text(1), no_text(1), generators(1), 1, steps)
    assert visited == list(range(steps))[::-1]
    with pytest.raises(ValueError, match=f"not {steps}"):
        decoder.inversion_ladder(steps)


def test_the_ladder_avoids_the_top_step_and_ends_at_the_picture():
    for schedule in (ALPHAS, upsample.linear_schedule()):
        top = decoder.top_step(schedule)
        assert float(schedule[top].sqrt()) >= 0.015 > float(schedule[top + 1].sqrt())
        for steps in (2, 27, 250, top + 1):
            rungs = decoder.ladder(steps, top)
            assert (rungs[0], rungs[-1], len(set(rungs))) == (0, top, steps)
            assert rungs == sorted(rungs)
    with pytest.raises(ValueError, match="between 1 and"):
        decoder.ladder(0, 990)


def test_an_error_in_eps_ruins_the_picture_from_the_top_step_but_not_from_the_ladder():
    """The trap that top_step is for: ε off by 0.03 (in the mean) before and after."""
    class Off(GaussianData):
        def __call__(self, x, t, z_i, text):
            return self.eps(x, t) + 0.03, torch.zeros_like(x)

    x, t = torch.randn(4, 3, 8, 8), decoder.top_step(ALPHAS)
    errors = {}
    for step in (999, t):
        a = float(ALPHAS[step])
        exact, off = (decoder.predict_x_0(x, kind(0.2, 0.2)(x, torch.full((4,), step), None, None)[0], a) for kind in (GaussianData, Off))
        errors[step] = float((exact - off).abs().max())
    assert errors[999] > 500 and errors[t] < 2.1


def test_a_copied_definition_is_the_same_in_every_stage():
    """Stages stand alone; what two of them define under one name must be one text, fixed everywhere or nowhere."""
    found = {}
    own = {"sample", "guided", "main"}  # each stage's own under a common name
    for stage in ("clip_embed", "prior", "decoder", "upsample"):
        tree = ast.parse((Path(__file__).parent.parent / f"{stage}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in own:
                found.setdefault(node.name, {})[stage] = ast.dump(node)
    copies = {name: where for name, where in found.items() if len(where) > 1}
    assert {"cosine_schedule", "q_sample", "posterior", "timestep_embedding", "ResBlock"} <= copies.keys()
    for name, where in copies.items():
        assert len(set(where.values())) == 1, f"{name} differs between {', '.join(where)}"

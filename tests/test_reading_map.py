"""docs/reading-map.md: whole, and true of the code; and table 3, from the paper, against the presets."""

import ast
import math
import re
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import clip_embed
import decoder
import prior
import train
import upsample
from data.embeddings import scale, standard

ROOT = Path(__file__).parent.parent
MAP = (ROOT / "docs/reading-map.md").read_text(encoding="utf-8").replace("](../", "](")  # paths from the root
MAP = re.sub(r"\.py#L\d+\)", ".py)", MAP)  # tests/test_side_by_side.py checks the lines

# What the paper holds, from its own table of contents, figures and tables, not from the map.
SECTIONS = "1 2 2.1 2.2 3 3.1 3.2 3.3 4 5.1 5.2 5.3 5.4 5.5 6 7".split()
FIGURES, TABLES, APPENDICES = range(1, 18), (1, 2, 3), "ABCD"
LINES = ("diffusion steps", "noise schedule", "sampling steps", "sampling variance", "crop fraction", "model size", "channels", "depth",
         "channel multiples", "channels a head", "attention resolutions", "text encoder context, width, depth, heads",
         "latent decoder context, width, depth, heads", "dropout", "weight decay", "batch size", "iterations", "learning rate", "Adam β1",
         "Adam β2", "Adam ε", "EMA decay")
FORMULAS = ("P(x|y) = P(x|z_i, y) P(z_i|y)", "cross-entropy over rows and columns", "L_simple + 0.001 L_vlb", "ε(∅) + w (ε(c) − ε(∅))",
            "E‖f(z_i^(t), t, y) − z_i‖²", "z_i times 17.2", "β̃ + (factor of x̂_0)² E‖x_0 − x̂_0‖²/d", "z_θ = slerp(z_1, z_2, θ)",
            "z_d = norm(z_t − z_t0), z_θ = slerp(z_i, z_d, θ)", "q(x_t|x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I)", "q(x_s|x_t, x_0), β̃_t",
            "x̂_0 = (x_t − √(1−ᾱ_t) ε)/√ᾱ_t", "f(u) = cos²((u + 0.008)/1.008 · π/2)", "log Σ = v log β + (1 − v) log β̃",
            "σ_t = η √((1−ᾱ_s)/(1−ᾱ_t)) √(1 − ᾱ_t/ᾱ_s)")
WITHOUT_CODE = {"§1", "§5.2", "§5.4", "fig. 13", "§6", "figs. 15–17", "appendix A", "appendix D"}  # no other row may lack it


def rows(page):
    """The map's rows, four cells each: what of the paper, code, choices, tests."""
    part = page.partition("\n## ")[0]
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip().replace("\\|", "|") for cell in line] for line in lines if line[0].strip() != "the paper"]


@lru_cache
def docstrings(path):
    """{name: docstring, on one line} of a file's functions and classes, and of the file itself under its path."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    named = {path: tree} | {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return {name: " ".join((ast.get_docstring(node) or "").split()) for name, node in named.items()}


def faults(page):
    """What is wrong with the map of a page, a line each."""
    found, table = [], rows(page)
    for of_paper, code, choice, tests in table:
        citations = re.findall(r"\*\*(.+?)\*\*", of_paper)
        links = re.findall(r"\[`([\w/.]+)`\]\((.+?)\)", code)
        found += [f"{of_paper}: cites nothing"] * (not citations)
        for label, path in links:  # module.function, or the path of a script, whose opening docstring then cites
            name = path if label == path else label.removeprefix(Path(path).stem + ".")
            there = docstrings(path) if (ROOT / path).exists() else {}
            if name not in there:
                found.append(f"{of_paper}: there is no {name} in {path}")
            found += [f"{of_paper}: the docstring of {label} does not cite {c}" for c in citations
                      if not re.search(re.escape(c) + r"(?![\d.]*\d)", there.get(name, c))]
        if not links and not (code == "–" and WITHOUT_CODE.intersection(citations) and len(choice) > 10):
            found.append(f"{of_paper}: has neither code nor a reason")
        named = re.findall(r"\[(.+?)\]\((tests/.+?)\)", tests)
        if bool(named) != bool(links):
            found.append(f"{of_paper}: has no test")
        for name, path in named:
            if not (ROOT / path).exists() or "test_" + name.replace(" ", "_") not in docstrings(path):
                found.append(f"{of_paper}: there is no test '{name}' in {path}")
    titles = "\n".join(of_paper for of_paper, *_ in table)
    numbers = {int(n) for span in re.findall(r"\*\*figs?\. ([\d–]+)\*\*", titles)
               for n in range(int(span.split("–")[0]), int(span.split("–")[-1]) + 1)}
    found += [f"figure {n} is not in the map" for n in FIGURES if n not in numbers]
    wanted = [f"**§{s}**" for s in SECTIONS] + [f"**table {n}**" for n in TABLES] + [f"**appendix {a}**" for a in APPENDICES]
    found += [f"{what} is not in the map" for what in [*wanted, *FORMULAS] if what not in titles]
    return found + [f"table 3, {line}: is not in the map" for line in LINES if f"**table 3** {line}" not in titles.splitlines()]


def test_the_map_is_whole_and_true():
    assert len(rows(MAP)) > 60
    assert faults(MAP) == []


@pytest.mark.parametrize("old, new, fault", [
    ("[`decoder.guided`](decoder.py)", "[`decoder.guide`](decoder.py)", "there is no guide in decoder.py"),
    ("[`decoder.guided`](decoder.py)", "[`decoder.guided`](guided.py)", "there is no decoder.guided in guided.py"),
    ("[`decoder.guided`](decoder.py)", "[`prior.py`](prior.py)", "the docstring of prior.py does not cite §5.3"),
    ("[`decoder.posterior`](decoder.py)", "[`decoder.zero`](decoder.py)", "the docstring of decoder.zero does not cite DDPM eqs. 6, 7"),
    ("**fig. 8**", "**fig. 88**", "the docstring of sample.generate does not cite fig. 88"),
    ("**§2.1** BSR", "**§2.2** BSR", "the docstring of upsample.bsr_degrade does not cite §2.2"),
    ("**§2.1** BSR", "§2.1 BSR", "cites nothing"),
    ("[posterior matches bayes rule on a grid]", "[posterior matches]", "there is no test 'posterior matches' in tests/test_diffusion.py"),
    ("[posterior matches bayes rule on a grid](tests/test_diffusion.py)", "–", "has no test"),
    ("[`manipulate.text_diff`](manipulate.py)", "–", "has neither code nor a reason"),
    ("**table 3** Adam ε", "**table 3** Adam epsilon", "table 3, Adam ε: is not in the map"),
    ("**§6**", "**§1**", "**§6** is not in the map"),
    ("**figs. 15–17**", "**figs. 15–16**", "figure 17 is not in the map"),
    ("slerp(z_1, z_2, θ)", "slerp(z_1, z_2)", "z_θ = slerp(z_1, z_2, θ) is not in the map"),
])
def test_what_is_wrong_with_a_map_is_found(old, new, fault):
    assert old in MAP and any(fault in line for line in faults(MAP.replace(old, new)))


def test_the_paper_presets_and_recipes_are_table_3():
    """Each cell as printed there, the networks' columns first; AR prior, diffusion prior, 64, 64→256, 256→1024."""
    ar, p, d = prior.AR_PRESETS["paper"], prior.PRESETS["paper"], decoder.PRESETS["paper"]
    first, second = upsample.PRESETS["paper"][256], upsample.PRESETS["paper"][1024]
    assert (len(prior.cosine_schedule()), len(decoder.cosine_schedule()), len(upsample.linear_schedule())) == (1000, 1000, 1000)
    assert (first.schedule, second.schedule) == ("cosine", "linear")
    assert (p.steps, d.steps, first.steps, second.steps) == (64, 250, 27, 15) and (first.eta, second.eta) == (0, 0)
    assert (first.crop, second.crop) == (0.25, 0.25)
    assert (d.channels, first.channels, second.channels) == (512, 320, 192)
    assert (d.depth, first.depth, second.depth) == (3, 3, 2)
    assert (d.multiples, first.multiples, second.multiples) == ((1, 2, 3, 4), (1, 2, 3, 4), (1, 1, 2, 2, 4, 4))
    assert (d.head_channels, d.attention) == (64, (32, 16, 8))
    assert (p.text_context, p.width, p.layers, p.heads) == (256, 2048, 24, 32)
    assert (d.text_context, d.text_width, d.text_layers, d.text_heads) == (256, 2048, 24, 32)
    assert (ar.width, ar.layers, ar.heads) == (1664, 24, 26) and (ar.components, ar.buckets) == (319, 1024) and ar.components + 2 <= 384
    assert (d.dropout, first.dropout, second.dropout) == (0.1, 0.1, 0)
    columns = [train.RECIPES["paper"][stage] for stage in ("ar-prior", "prior", "decoder", "upsample-256", "upsample-1024")]
    assert [r.weight_decay for r in columns] == [0.04, 0.06, 0, 0, 0]
    assert [r.batch_size for r in columns] == [4096, 4096, 2048, 1024, 512]
    assert [r.steps for r in columns] == [1_000_000, 600_000, 800_000, 1_000_000, 1_000_000]
    assert [r.learning_rate for r in columns] == [1.6e-4, 1.1e-4, 1.2e-4, 1.2e-4, 1e-4]
    assert [r.beta2 for r in columns] == [0.91, 0.96, 0.999, 0.999, 0.999]
    assert [r.eps for r in columns] == [1e-10, 1e-6, 1e-8, 1e-8, 1e-8]
    assert [r.ema_decay for r in columns] == [0.999, 0.9999, 0.9999, 0.9999, 0.9999]
    c = clip_embed.PRESETS["paper"]  # appendix C
    assert (c.image_size, c.vision_patch_size, c.vision_width, c.vision_layers) == (256, 16, 1280, 32)
    assert (c.text_width, c.text_layers, c.embed_dim, train.RECIPES["paper"]["clip"].learning_rate) == (1024, 24, 1024, 3e-4)


def test_the_optimizer_is_the_recipes_with_beta_1_of_0_9(monkeypatch, tmp_path):
    recipe, seen = train.RECIPES["paper"]["prior"], {}

    class Reached(Exception):
        pass

    def adamw(groups, lr, betas, eps, weight_decay, **options):  # of groups that name no decay of their own
        seen.update(lr=lr, betas=betas, eps=eps, groups=[{"weight_decay": weight_decay} | group for group in groups])
        raise Reached

    monkeypatch.setitem(train.RECIPES["shapes"], "upsample-256", recipe)
    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    monkeypatch.setattr(sys, "argv", ["train.py", "upsample-256", "--out", str(tmp_path / "run"), "--device", "cpu"])
    with pytest.raises(Reached):
        train.main()
    assert (seen["lr"], seen["betas"], seen["eps"]) == (1.1e-4, (0.9, 0.96), 1e-6)
    decays = {group["weight_decay"]: {p.ndim > 1 for p in group["params"]} for group in seen["groups"]}
    assert decays == {0.06: {True}, 0: {False}}  # matrices and kernels; not biases and norms


@torch.no_grad()
def test_the_paper_preset_scales_z_i_by_17_2_at_1024_and_to_one_deviation_elsewhere():
    assert scale(1024) == pytest.approx(17.2)
    for d in (128, 768, 1024):
        z_i = torch.nn.functional.normalize(torch.randn(4000, d), dim=1)
        model = prior.DiffusionPrior(replace(prior.PRESETS["shapes"], embed_dim=d))
        model.load_state_dict(standard(z_i, "paper"), strict=False)
        z = model.standardize(z_i)
        assert torch.allclose(z, z_i * scale(d), rtol=1e-4)
        assert float(z.std()) == pytest.approx(17.2 / math.sqrt(1024), rel=0.01)


@pytest.mark.parametrize("stage, order", [
    ("clip_embed", "Tokenizer CLIP contrastive_loss encode_captions preprocess load_clip main"),
    ("prior", "q_sample DiffusionPrior prior_loss sample pca ARPrior ar_loss ar_sample main"),
    ("decoder", "q_sample Decoder decoder_loss guided sample invert main"),
    ("upsample", "q_sample Upsampler bsr_degrade training_crops upsampler_loss sample main"),
    ("sample", "Chain surprise generate save_png main"),
    ("train", "Recipe learning_rate row_generators train prepare main"),
    ("manipulate", "invert decode variations interpolate text_diff pca_reconstruct main"),
])
def test_a_stage_file_opens_with_its_story_in_a_screen_and_keeps_to_its_order(stage, order):
    tree = ast.parse((ROOT / f"{stage}.py").read_text(encoding="utf-8"))
    story = ast.get_docstring(tree)
    assert len(story.splitlines()) <= 35 and all(f"\n{word}" in story for word in ("In:  ", "Out: ")) and f"python {stage}.py" in story
    assert re.search(r"§\d|fig\. \d|appendix C", story.splitlines()[0])
    names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    places = [names.index(name) for name in order.split()]
    assert places == sorted(places)

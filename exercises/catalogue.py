"""The exercises, in the paper's order: what hand_out.py takes out and grade.py looks at. Points are set here."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Exercise:
    """One exercise. Its points are shared evenly among its functions, copies in other stage files included."""
    number: int
    title: str
    section: str               # of the paper
    points: int
    minutes: int               # for a student who has read that section
    functions: tuple           # "file.function" or "file.Class.method"
    gives_away: tuple = ()     # exercises whose solutions show this one's: handed out together with it

    @property
    def page(self):
        """The page's name in exercises/pages."""
        return f"{self.number:02d}-{re.sub('[^a-z0-9]+', '-', self.title.lower()).strip('-')}.md"


def rows(exercises):
    """Their rows of the table in exercises/README.md."""
    return "".join(f"| {e.number} | [{e.title}](pages/{e.page}) | §{e.section} | "
                   f"{', '.join(dict.fromkeys(f.partition('.')[0] + '.py' for f in e.functions))} | {e.points} | {e.minutes} "
                   f"min |\n"
                   for e in exercises)


def copies(name, *stages):
    """The same function in several stage files."""
    return tuple(f"{stage}.{name}" for stage in stages)


EXERCISES = (
    Exercise(1, "Byte-pair merges", "2", 5, 45, ("clip_embed.merge_pair", "clip_embed.Tokenizer.encode_word")),
    Exercise(2, "The contrastive loss", "2", 4, 30, ("clip_embed.contrastive_loss",)),
    Exercise(3, "The cosine schedule", "2.1", 3, 30, copies("cosine_schedule", "decoder", "prior", "upsample")),
    Exercise(4, "Noise on a picture", "2.1", 3, 30, copies("q_sample", "decoder", "prior", "upsample")),
    Exercise(5, "The posterior", "2.1", 6, 60, copies("posterior", "decoder", "prior"), gives_away=(11,)),
    Exercise(6, "The learned variance", "2.1", 4, 45, ("decoder.learned_log_variance", "decoder.normal_kl")),
    Exercise(7, "Attention with a context", "2.1", 6, 60, ("decoder.AttentionBlock.forward",)),
    Exercise(8, "Two ways in for z_i", "2.1", 4, 30, ("decoder.Decoder.inject",)),
    Exercise(9, "Classifier-free guidance", "2.1", 6, 45, ("decoder.guided", "prior.guided")),
    Exercise(10, "The decoder's loss", "2.1", 8, 120, ("decoder.decoder_loss",)),
    Exercise(11, "A DDIM step", "2.1", 4, 45, copies("ddim_step", "decoder", "upsample"), gives_away=(17,)),
    Exercise(12, "Damaged crops", "2.1", 5, 90, ("upsample.gaussian_blur", "upsample.training_crops")),
    Exercise(13, "The prior's sequence", "2.2", 7, 90, ("prior.DiffusionPrior.sequence",)),
    Exercise(14, "Predicting z_i itself", "2.2", 6, 60, ("prior.prior_loss", "prior.estimate_errors")),
    Exercise(15, "Principal components", "2.2", 6, 90, ("prior.pca",)),
    Exercise(16, "Embeddings as codes", "2.2", 7, 180, ("prior.quantile_buckets", "prior.fit_codes", "prior.ARPrior.encode",
                                                       "prior.ARPrior.decode"), gives_away=(20,)),
    Exercise(17, "Inversion", "3", 6, 120, ("decoder.invert",)),
    Exercise(18, "Slerp", "3.2", 4, 45, ("manipulate.slerp",)),
    Exercise(19, "Text diffs", "3.3", 4, 45, ("manipulate.text_diff",)),
    Exercise(20, "From coarse to fine", "4", 2, 30, ("manipulate.pca_reconstruct",)),
)


def choose(numbers):
    """The exercises of these numbers, and those that would give them away, in order. Raises ValueError; none: all of them."""
    by_number = {exercise.number: exercise for exercise in EXERCISES}
    unknown = sorted(set(numbers) - by_number.keys())
    if unknown:
        raise ValueError(f"there is no exercise {unknown[0]}: they are numbered 1 to {len(EXERCISES)}")
    chosen, more = set(), set(numbers or by_number)
    while more:
        chosen |= more
        more = {n for k in more for n in by_number[k].gives_away} - chosen
    return [exercise for exercise in EXERCISES if exercise.number in chosen]

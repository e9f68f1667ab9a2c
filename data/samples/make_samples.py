"""Write the sample files beside this script: one of each form that `environment: files` reads.

Run it from anywhere: ``python data/samples/make_samples.py``. The texts are ours, so the files carry
the licence of this repository.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent

# MemFactory's form: several answers are aliases
MEMFACTORY = [
    {
        "context": "Document 1:\nThe lighthouse of Marrow Point dates from 1871. The first keeper was Ida Collins.\n\n"
        "Document 2:\nIda Collins was born in Port Varden and kept bees in her old age.",
        "input": "In which town was the first keeper of the Marrow Point lighthouse born?",
        "answers": ["Port Varden"],
        "num_docs": 2,
    },
    {
        "context": "Document 1:\nThe river Senn rises in the Hollow Hills and meets the sea at Tarn.\n\n"
        "Document 2:\nThe bridge at Tarn is called the Long Step. It has nineteen arches.",
        "input": "How many arches does the bridge have in the town where the river Senn meets the sea?",
        "answers": ["nineteen", "19"],
        "num_docs": 2,
    },
    {
        "context": "Document 1:\nThe orchestra of Brill plays every June. Its conductor is Tomas Hale.\n\n"
        "Document 2:\nTomas Hale, also known as Tom Hale, wrote the opera The Salt Road.",
        "input": "Who wrote the opera The Salt Road?",
        "answers": ["Tomas Hale", "Tom Hale"],
        "num_docs": 2,
    },
    {
        "context": "Document 1:\nThe Greyfield mill closed in 1932.\n\nDocument 2:\nThe Alder mill still grinds rye.",
        "input": "Is the Greyfield mill still open?",
        "answers": "no",
        "num_docs": 2,
    },
]
JSON_LINES = [
    {
        "context": "The ferry to Osk leaves at six. The ferry to Lunn leaves at seven.",
        "input": "When does the ferry to Lunn leave?",
        "answers": ["at seven", "seven"],
    },
    {
        "context": "Mara sold the red boat to Piet. Piet painted it green.",
        "input": "Which colour is Piet's boat?",
        "answers": "green",
    },
    {
        "context": "The museum has 12 rooms. Two of them are closed in winter.",
        "input": "How many rooms of the museum are closed in winter?",
        "answers": ["two", 2],
    },
]
# RULER's form: all `outputs` are required
OUTPUTS = [
    {
        "context": "velka soru velka tamin velka soru doppe tamin velka soru tamin velka",
        "input": "Which three words are the most frequent in the coded text?",
        "outputs": ["velka", "soru", "tamin"],
        "answer_prefix": "The three most frequent words are",
        "length": 12,
    },
    {
        "context": "norb lisk norb pelu lisk norb lisk gant pelu norb lisk norb pelu",
        "input": "Which three words are the most frequent in the coded text?",
        "outputs": ["norb", "lisk", "pelu"],
        "answer_prefix": "The three most frequent words are",
        "length": 13,
    },
]


def memagent(index: int, context: str, question: str, answers: list[str]) -> dict:
    """A row in the form of MemAgent's Parquet files."""
    return {
        "data_source": "sample",
        "prompt": [{"role": "user", "content": question}],
        "context": context,
        "ability": "memory",
        "reward_model": {"style": "rule", "ground_truth": answers},
        "extra_info": {"index": index, "question": question, "num_docs": 1},
    }


MEMAGENT = [
    memagent(0, "The clock of Velm was cast by Anders Roe.", "Who cast the clock of Velm?", ["Anders Roe", "Roe"]),
    memagent(1, "The path over Crane Pass is 14 km long.", "How long is the path over Crane Pass?", ["14 km"]),
    memagent(2, "Lea plays the cello and Jon the oboe.", "Which instrument does Jon play?", ["oboe", "the oboe"]),
]


def main(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, rows in (("memfactory", MEMFACTORY), ("outputs", OUTPUTS)):
        text = json.dumps(rows, indent=2, ensure_ascii=False)
        (folder / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")
    lines = [json.dumps(row, ensure_ascii=False) for row in JSON_LINES]
    (folder / "memfactory.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(MEMAGENT), folder / "memagent.parquet")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)

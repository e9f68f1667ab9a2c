"""One of the processes that `test_ranks.py` starts: our trainer's step on recorded episodes, case by case.

Arguments: a JSON list of cases, and the file for the gradients, which rank 0 writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.train.conftest import EVERY_SCOPE, VOCABULARY, make_model, recorded_groups, step_of_ours, tiny_tokenizer


def main() -> None:
    cases, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    results = []
    for number, case in enumerate(cases):
        steps, trainer = step_of_ours(
            recorded_groups(**case["groups"]),
            make_model(),
            tiny_tokenizer(VOCABULARY),
            out.parent / f"run{number}",
            budget=case["budget"],
            dimensions=EVERY_SCOPE if case["every_scope"] else (),
            **case["options"],
        )
        both = [torch.empty_like(steps[0]) for _ in range(dist.get_world_size())]
        dist.all_gather(both, steps[0])
        results.append({"gradients": both, "micro_batches": sum(map(len, trainer._buffer))})
    if dist.get_rank() == 0:
        torch.save(results, out)
    dist.destroy_process_group()


main()

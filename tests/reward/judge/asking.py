"""A process of its own that grades what it reads: ``python asking.py URL CACHE``.

Each line of input is a space-separated list of answers to grade; each line of output is their scores and what
the judge counted, as JSON. It ends when the input does, without closing the judge.
"""

from __future__ import annotations

import asyncio
import json
import sys
import warnings

from memfactory.recipe import JudgeSection
from memfactory.reward.judge import ModelJudge, Rubric

RUBRIC = Rubric("fits", "1", "yes: the answer fits. no: it does not.", {"yes": 1.0, "no": 0.0})


async def main(url: str, cache: str) -> None:
    judge = ModelJudge(JudgeSection(base_url=url, model="grader", cache=cache))
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scores = await asyncio.gather(*(judge.grade(RUBRIC, answer=answer) for answer in line.split()))
        told = {"scores": [score.value for score in scores], "warnings": [str(w.message) for w in caught]}
        print(json.dumps(told | judge.metrics()), flush=True)


asyncio.run(main(*sys.argv[1:]))

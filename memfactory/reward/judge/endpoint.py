"""The judge's endpoint: a question goes out as a chat, and only a verdict of its rubric comes back."""

from __future__ import annotations

from dataclasses import dataclass, field

from memfactory.endpoints.chat import ChatEndpoint, Completion
from memfactory.endpoints.failures import Failure, Fixes, RequestFailed
from memfactory.errors import JudgeError, boundary
from memfactory.recipe import JudgeSection
from memfactory.reward.judge.prompt import Question, UnreadableVerdict, Verdict, read_verdict
from memfactory.reward.judge.tally import Tally

FIXES = Fixes(
    {
        Failure.RATE_LIMIT: "lower judge.concurrency, or set judge.requests_per_minute and judge.tokens_per_minute",
        Failure.TIMEOUT: "raise judge.deadline, or lower judge.concurrency",
        Failure.SERVER: "look at the log of the judge's server",
        Failure.CONNECTION: "check judge.base_url and that its server runs",
        Failure.CUT: "look at the log of the judge's server, or of the proxy before it",
        Failure.GARBAGE: "judge.base_url must be an OpenAI-compatible endpoint, e.g. http://localhost:8000/v1",
        Failure.VERDICT: "use a model and server that support structured output, or raise judge.max_tokens",
        Failure.REFUSED: "see the server's message",
        Failure.ADDRESS: "check judge.base_url and the key in judge.api_key_env",
        Failure.DEADLINE: "raise judge.deadline, or lower judge.concurrency",
    },
    {
        400: "check judge.model, judge.max_tokens and that the server supports response_format json_schema",
        401: "put a valid key into the environment variable named by judge.api_key_env",
        403: "the key may not use this model: check judge.model and judge.api_key_env",
        404: "check judge.base_url (it usually ends in /v1) and judge.model",
        413: "the text to grade is too long for the server",
        422: "check judge.model and that the server supports response_format json_schema",
    },
)


@dataclass(slots=True)
class Endpoint:
    """Asks one model one question at a time; many may ask at once."""

    section: JudgeSection
    tally: Tally
    _chat: ChatEndpoint = field(init=False)

    def __post_init__(self) -> None:
        section = self.section
        self._chat = ChatEndpoint(
            base_url=section.base_url or "",
            settings="judge.",
            fixes=FIXES,
            tally=self.tally,
            api_key_env=section.api_key_env,
            concurrency=section.concurrency,
            deadline=section.deadline,
            attempts=section.attempts,
            max_tokens=section.max_tokens,
            requests_per_minute=section.requests_per_minute,
            tokens_per_minute=section.tokens_per_minute,
        )

    async def ask(self, question: Question) -> Verdict:
        """The verdict on `question`, after as many attempts as the recipe allows.

        Raises:
            JudgeError: none came; says why and what to change.
        """

        def read(completion: Completion) -> Verdict:
            try:
                return read_verdict(completion.text or "", question.labels)
            except UnreadableVerdict as error:
                raise RequestFailed(Failure.VERDICT, str(error)) from error

        body = {
            "model": self.section.model,
            "messages": question.messages,
            "temperature": self.section.temperature,
            "max_tokens": self.section.max_tokens,
            "response_format": question.response_format,
        }
        what = f"judge '{self.section.model}' gave no verdict on rubric '{question.rubric}'"
        with boundary(JudgeError, what):
            try:
                return await self._chat.ask(body, read)
            except RequestFailed as failed:
                raise JudgeError(what, failed.why, failed.fix) from failed

    async def aclose(self) -> None:
        """Close the running loop's connections."""
        await self._chat.aclose()

"""The decoding thread: takes jobs from a queue, assigns slots to them, and passes on new tokens."""

import collections
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError, one_line
from gptjax.generation.decode import DecodingModel, Logprobs
from gptjax.generation.sample import TextCollector
from gptjax.generation.slots import CHUNKS, Event, Row, SlotDecoder
from gptjax.generation.stream import make_text_stream
from gptjax.serving.metrics import Metrics
from gptjax.text.tokenizers.base import Tokenizer

Finish = Literal["stop", "length"]


class QueueFull(Exception):
    """The queue has no room for more jobs."""


class Failure(Exception):
    """A job failed for a reason that is not in the request."""


class Token(NamedTuple):
    """A new token, or a token of the prompt."""

    id: int
    begin: int
    """Number of characters of the text before the token."""
    logprob: float | None
    """Log-probability; None if not requested, and for the first token of a prompt."""
    top: tuple[tuple[int, float], ...]
    """The most likely tokens and their log-probabilities."""


class Update(NamedTuple):
    """New output of a job."""

    text: str = ""
    """New text that is certain; the updates join to the whole text."""
    tokens: tuple[Token, ...] = ()
    """Tokens that begin in the text so far and were in no earlier update."""
    prompt_logprobs: Logprobs | None = None
    finish: Finish | None = None
    """Why the sequence ended; None: it is not finished."""
    error: Exception | None = None
    """The error that ended the job."""


class Job:
    """A sequence to decode, and the function that receives its output."""

    def __init__(self, row: Row, tokenizer: Tokenizer, seconds: float, on_update: Callable[[Update], None]):
        self.row, self._tokenizer, self.on_update = row, tokenizer, on_update
        self.collector = TextCollector(tokenizer, row.options)
        self.created, self.deadline = time.monotonic(), time.monotonic() + seconds
        self.cancelled = False
        self.last_token_at: float | None = None
        self._decode = make_text_stream()
        self._text_length, self._begin, self._waiting = 0, 0, collections.deque[Token]()

    @property
    def overdue(self) -> bool:
        """Whether its time limit has passed."""
        return time.monotonic() > self.deadline

    def take(self, event: Event) -> Update:
        """Converts an event of the decoder to an update."""
        text = self.collector.add(event.piece)
        for n, token in enumerate(event.piece.tokens_N.tolist()):
            logprobs = event.piece.logprobs
            logprob = None if logprobs is None else float(logprobs.chosen_N[n])
            top = () if logprobs is None else pairs(logprobs.ids_NK[n], logprobs.top_NK[n])
            self._waiting.append(Token(token, self._begin, logprob, top))
            self._begin += len(self._decode(self._tokenizer.decode_bytes([token]), False))
        ended = event.ended or self.collector.stopped
        if ended:
            text += self.collector.end()
        self._text_length += len(text)
        tokens = []
        while self._waiting and self._waiting[0].begin < self._text_length:
            tokens.append(self._waiting.popleft())
        full = self.row.score_only or self.row.new >= self.row.options.max_new_tokens
        length = event.ended and full and not self.collector.stopped
        finish: Finish | None = ("length" if length else "stop") if ended else None
        return Update(text, tuple(tokens), event.prompt_logprobs, finish)

    def close(self, finish: Finish) -> Update:
        """Ends the job; the update has the rest of the text."""
        text = self.collector.end()
        return Update(text, tuple(self._waiting), None, finish)


class Engine:
    """Runs jobs from a queue in the decoder's slots."""

    def __init__(self, model: DecodingModel, slots: int, max_queue: int, metrics: Metrics):
        self._model, self._slots, self._max_queue, self._metrics = model, slots, max_queue, metrics
        self._decoder = SlotDecoder(model, slots)
        self._queue: collections.deque[Job] = collections.deque()
        self._running: dict[Row, Job] = {}
        self._late: list[Event] = []  # delivered while the device computes the next step
        self._condition, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)

    def start(self) -> None:
        """Starts the decoding thread."""
        self._thread.start()

    @property
    def works(self) -> bool:
        """Whether the engine accepts jobs."""
        return self._thread.is_alive() and not self._closing

    def warm_up(self) -> None:
        """Compiles the programs that most requests need. Call it before `start`."""
        chunks = [(rows, length) for rows, length in CHUNKS if length < self._model.config.block_size] or [(1, 1)]
        vocab_size = self._model.config.vocab_size
        kinds = ((1.0, 0), (0.9, 0), (1.0, 1), (0.9, 1))
        for number, (top_p, logprobs) in enumerate(kinds):
            options = SampleConfig(max_new_tokens=1, top_p=top_p, logprobs=logprobs)
            for rows, length in chunks if number == 0 else chunks[:1]:
                for row in range(min(rows, self._slots)):
                    token = (number + length + rows + row) % vocab_size  # another in each round: no prefix is reused
                    tokens = np.full(length, token, np.int32)
                    self._decoder.start(Row(tokens, options))
                while self._decoder.rows:
                    self._decoder.step()

    def submit(self, jobs: list[Job]) -> None:
        """Puts jobs into the queue, all or none.

        Raises:
            QueueFull: The queue has no room for all of them.
            Failure: The engine is closing.
        """
        with self._condition:
            if not self.works:
                raise Failure("the server is shutting down")
            free = self._slots - len(self._running)
            if len(self._queue) + len(jobs) > self._max_queue + free:
                raise QueueFull
            self._queue.extend(jobs)
            self._condition.notify()

    def cancel(self, jobs: list[Job]) -> None:
        """Cancels jobs; their slots are free after the current step."""
        with self._condition:
            for job in jobs:
                job.cancelled = True
            self._condition.notify()

    def close(self) -> None:
        """Finishes all jobs and ends the thread."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Number of jobs in the queue."""
        return len(self._queue)

    @property
    def busy(self) -> int:
        """Number of slots in use."""
        return len(self._running)

    def _run(self) -> None:
        while True:
            with self._condition:
                while not (self._queue or self._running or self._closing):
                    self._condition.wait()
                if self._closing and not (self._queue or self._running):
                    return
                taken = self._take()
            try:
                for job in taken:
                    self._start(job)
                self._drop()
                if self._running:
                    self._step()
            except Exception as error:
                traceback.print_exc()
                self._fail(error)
            self._metrics.slots(self.busy, self.waiting)

    def _step(self) -> None:
        """Advances all sequences. Events of sequences that end are delivered at once, because they free a slot."""
        events = self._decoder.step(self._deliver_late)
        ended = {event.row for event in events if event.ended}
        self._late = [event for event in events if event.row not in ended]
        for event in events:
            if event.row in ended:
                self._deliver(event)

    def _take(self) -> list[Job]:
        """Takes jobs for the free slots, oldest first; ends those whose time limit has passed."""
        taken: list[Job] = []
        waiting = [job for job in self._queue if not job.cancelled]
        self._queue.clear()
        for job in waiting:
            if job.overdue:
                job.on_update(Update(error=Failure("the request waited too long; try again later")))
            elif len(self._running) < self._slots:
                self._running[job.row] = job
                taken.append(job)
            else:
                self._queue.append(job)
        return taken

    def _start(self, job: Job) -> None:
        try:
            self._decoder.start(job.row)
        except UserError as error:
            del self._running[job.row]
            job.on_update(Update(error=error))

    def _drop(self) -> None:
        """Frees the slots of jobs that were cancelled or whose time limit has passed."""
        for row, job in list(self._running.items()):
            overdue = job.overdue
            if overdue and not job.cancelled:
                self._deliver_late()
            if job.cancelled or overdue:
                self._decoder.stop(row)
                if self._running.pop(row, None) is not None and not job.cancelled:
                    job.on_update(job.close("length"))

    def _deliver_late(self) -> None:
        late, self._late = self._late, []
        for event in late:
            self._deliver(event)

    def _deliver(self, event: Event) -> None:
        job = self._running.get(event.row)
        if job is None:
            return
        update = job.take(event)
        now, new = time.monotonic(), len(event.piece.tokens_N)
        if new:
            self._metrics.tokens(new, now - (job.last_token_at or job.created), first=job.last_token_at is None)
            job.last_token_at = now
        if update.finish is not None:
            self._decoder.stop(event.row)
            del self._running[event.row]
        job.on_update(update)

    def _fail(self, error: Exception) -> None:
        """Ends all jobs in slots after an error, because the state of the decoder is then undefined."""
        failure = Failure(one_line(error) or "the server failed while it decoded; its log says why")
        for job in self._running.values():
            job.on_update(Update(error=failure))
        self._running.clear()
        self._late.clear()
        self._decoder = SlotDecoder(self._model, self._slots)


def pairs(ids_K: Any, top_K: Any) -> tuple[tuple[int, float], ...]:
    """Pairs of token id and log-probability."""
    return tuple(zip((int(id) for id in ids_K), (float(logprob) for logprob in top_K), strict=True))

"""Stores jobs, their changes of state and their webhooks in SQLite or PostgreSQL.

Every change of a job's state is one conditional statement, so that of two concurrent changes one fails. A terminal
state never changes, except by a retry. The event of a change, and the webhook of an end, are stored in the same
transaction.
"""

from __future__ import annotations

import base64
import hashlib
import json
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from cryptography.fernet import Fernet, InvalidToken
from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Row,
    Select,
    bindparam,
    delete,
    func,
    insert,
    literal,
    select,
    text,
    true,
    update,
)
from sqlalchemy.exc import IntegrityError

from comfy_worker.gateway.errors import (
    DatabaseUnavailable,
    DuplicateKey,
    DuplicateRequest,
    QueueFull,
    UnreadableRequest,
)
from comfy_worker.gateway.store.database import WRITES, WriteLock, raises_database_unavailable
from comfy_worker.gateway.store.migrate import bring_up_to_date
from comfy_worker.gateway.store.records import JobRecord, ProgressRecord, WebhookDelivery
from comfy_worker.gateway.store.stage_seconds import StageTimes, add_seconds, read_seconds, seconds_by_stage
from comfy_worker.gateway.store.tables import events, idempotency_keys, jobs, webhook_deliveries
from comfy_worker.types import JobState

STATUS = "status"
_OPEN = (JobState.IN_QUEUE.value, JobState.IN_PROGRESS.value)
_WITHOUT_RESULT = (JobState.FAILED, JobState.TIMED_OUT, JobState.CANCELLED)
_TIMES = select(jobs.c.created_at, jobs.c.started_at)
_NO_PROGRESS = dict.fromkeys(("progress", "progress_number"))
_SHOWN = [column for column in jobs.c if column.name != "request"]
_QUEUE_LOCK = 0x636F6D68
"""A number that nothing else locks in PostgreSQL."""


def event_number(at: float) -> int:
    """Return the number of an event at a time: microseconds since the epoch."""
    return int(at * 1_000_000)


class JobStore:
    """Stores jobs; methods may be called from any thread, and return when their changes are durable.

    Each raises `DatabaseUnavailable` while the database cannot be used. Its change may have been made even so, because
    the database's reply can get lost.

    Attributes:
        on_webhook_due: called when a job has ended and its webhook is due, in the thread that ended it.
        on_change: called likewise with the id of a job that was added, changed its state, or was deleted.
    """

    def __init__(self, engine: Engine, secret: bytes) -> None:
        """Open the database and bring its tables up to date.

        Args:
            engine: made by `database.connect`.
            secret: requests are encrypted with it; all processes that use the database need the same.

        Raises:
            DatabaseUnavailable: it cannot be used.
        """
        self._engine = engine
        self._writer = engine.execution_options(**WRITES)
        self._write_lock = WriteLock(engine)
        self._cipher = Fernet(base64.urlsafe_b64encode(hashlib.sha256(secret).digest()))
        self.on_webhook_due: Callable[[], None] = _nothing
        self.on_change: Callable[[str], None] = _nothing
        self._is_disabled = False
        with raises_database_unavailable():
            bring_up_to_date(self._writer)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    def disable(self) -> None:
        """Make all methods raise from now on, because another gateway has taken over the database."""
        self._is_disabled = True

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        self._check_enabled()
        with raises_database_unavailable(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """Run the block in one transaction."""
        self._check_enabled()
        with raises_database_unavailable(), self._write_lock.held(), self._writer.begin() as connection:
            yield connection

    def _check_enabled(self) -> None:
        if self._is_disabled:
            raise DatabaseUnavailable("Another gateway has taken over the database, and this one ends")

    # ---------------------------------------------------------------------------------------------- jobs

    def add(
        self,
        record: JobRecord,
        idempotency_key: str | None = None,
        body_hash: str = "",
        *,
        max_waiting: int | None = None,
        max_waiting_of_owner: int | None = None,
        renew: bool = False,
        replace_ended: bool = False,
    ) -> JobRecord:
        """Add a job; return it, or the job that was accepted under the same key before.

        Args:
            record: the job, with its request.
            idempotency_key: the caller's key for this request.
            body_hash: the hash of the request.
            max_waiting: how many jobs may be waiting at most, this one included.
            max_waiting_of_owner: how many of them may be its owner's.
            renew: whether the key of a job that ended without a result may be used again.
            replace_ended: whether the id of a job that has ended may be used again, by the same owner and after its
                webhook.

        Raises:
            DuplicateKey: the key was used with another body.
            DuplicateRequest: there is a job with this id.
            QueueFull: too many jobs are waiting.
        """
        columns = self._columns(record)
        try:
            with self._writing() as connection:
                earlier = self._accepted_before(connection, idempotency_key, body_hash)
                if earlier is not None and renew and earlier.state in _WITHOUT_RESULT:
                    connection.execute(delete(idempotency_keys).where(idempotency_keys.c.key == idempotency_key))
                elif earlier is not None:
                    return earlier
                _check_queue_size(connection, [record], max_waiting, max_waiting_of_owner)
                if replace_ended:
                    connection.execute(delete(jobs).where(_is_replaceable(record.id, record.owner)))
                connection.execute(insert(jobs).values(**columns))
                _add_event(connection, record.id, record.state, record.created_at)
                if idempotency_key is not None:
                    row = {"key": idempotency_key, "body_hash": body_hash, "job_id": record.id}
                    connection.execute(insert(idempotency_keys).values(**row))
        except IntegrityError:
            # A job with the same key or id was added at the same time.
            with self._reading() as connection:
                earlier = self._accepted_before(connection, idempotency_key, body_hash)
            if earlier is None:
                raise DuplicateRequest(
                    f"There is a job with the id {record.id!r} already", hint="Wait for its end, or use another id"
                ) from None
            return earlier
        self.on_change(record.id)
        return record

    def add_all(
        self,
        records: Sequence[JobRecord],
        *,
        max_waiting: int | None = None,
        max_waiting_of_owner: int | None = None,
    ) -> None:
        """Add several jobs of one owner, all of them or none; the limits are as in `add`.

        Raises:
            DuplicateRequest: there is a job with one of their ids.
            QueueFull: too many jobs would wait.
        """
        rows = [self._columns(record) for record in records]
        try:
            with self._writing() as connection:
                _check_queue_size(connection, records, max_waiting, max_waiting_of_owner)
                connection.execute(insert(jobs), rows)
                for record in records:
                    _add_event(connection, record.id, record.state, record.created_at)
        except IntegrityError:
            raise DuplicateRequest("There is a job with one of these ids already") from None
        for record in records:
            self.on_change(record.id)

    def _accepted_before(self, connection: Connection, key: str | None, body_hash: str) -> JobRecord | None:
        if key is None:
            return None
        query = select(idempotency_keys.c.body_hash, *_SHOWN).join(jobs).where(idempotency_keys.c.key == key)
        row = connection.execute(query).one_or_none()
        if row is None:
            return None
        if row.body_hash != body_hash:
            raise DuplicateKey("This Idempotency-Key was used with another body")
        return _record(row)

    def get(self, job_id: str) -> JobRecord | None:
        """Return a job without its request, None if there is none with this id."""
        if "\0" in job_id:  # PostgreSQL does not take it
            return None
        with self._reading() as connection:
            row = connection.execute(select(*_SHOWN).where(jobs.c.id == job_id)).one_or_none()
        return None if row is None else _record(row)

    def request_of(self, job_id: str) -> Mapping[str, Any] | None:
        """Return the request of a job, None if there is no such job.

        Raises:
            UnreadableRequest: it was encrypted with another key.
        """
        with self._reading() as connection:
            encrypted = connection.execute(select(jobs.c.request).where(jobs.c.id == job_id)).scalar_one_or_none()
        if encrypted is None:
            return None
        try:
            request: Mapping[str, Any] = json.loads(self._cipher.decrypt(encrypted))
        except InvalidToken:
            raise UnreadableRequest(
                "The job was accepted under another GATEWAY_KEY and cannot be read", hint="Send it again"
            ) from None
        return request

    def latest(
        self, endpoint_id: str | None = None, limit: int = 100, owners: Collection[str] | None = None
    ) -> Sequence[JobRecord]:
        """Return the latest jobs, newest first, without their requests; `owners` as in `with_prefix`."""
        query = select(*_SHOWN).where(_is_of(owners)).order_by(jobs.c.created_at.desc()).limit(limit)
        if endpoint_id is not None:
            query = query.where(jobs.c.endpoint_id == endpoint_id)
        return self._records(query)

    def with_prefix(self, prefix: str, owners: Collection[str] | None = None) -> Sequence[JobRecord]:
        """Return the jobs whose ids begin with a prefix, without their requests, oldest first.

        Args:
            prefix: of the ids.
            owners: only their jobs; all jobs if None.
        """
        query = select(*_SHOWN).where(jobs.c.id.startswith(prefix, autoescape=True), _is_of(owners))
        return self._records(query.order_by(jobs.c.created_at, jobs.c.id))

    def unfinished(self) -> Sequence[JobRecord]:
        """Return all jobs that have not ended, without their requests, the next to run first."""
        query = select(*_SHOWN).where(jobs.c.state.in_(_OPEN))
        return self._records(query.order_by(jobs.c.priority.desc(), jobs.c.created_at))

    def counts(self) -> Mapping[JobState, int]:
        """Return the number of jobs in each state."""
        query = select(jobs.c.state, func.count()).group_by(jobs.c.state)
        with self._reading() as connection:
            return {JobState(state): count for state, count in connection.execute(query)}

    def counts_by_owner(self) -> Mapping[str, Mapping[JobState, int]]:
        """Return the number of jobs of each owner in each state."""
        query = select(jobs.c.owner, jobs.c.state, func.count()).group_by(jobs.c.owner, jobs.c.state)
        found: dict[str, dict[JobState, int]] = {}
        with self._reading() as connection:
            for owner, state, count in connection.execute(query):
                found.setdefault(owner, {})[JobState(state)] = count
        return found

    def seconds_by_stage(self) -> Mapping[str, StageTimes]:
        """Return how long the jobs that have ended were in each stage, including jobs that are deleted."""
        with self._reading() as connection:
            return read_seconds(connection)

    def retried(self) -> int:
        """Return the number of jobs that were put back into the queue, by their caller or by the gateway."""
        query = select(func.count()).select_from(jobs).where(jobs.c.retries > 0)
        with self._reading() as connection:
            count: int = connection.execute(query).scalar_one()
        return count

    # --------------------------------------------------------------------------------------------- states

    def start(self, job_id: str, prompt_id: str, backend: str, now: float) -> bool:
        """Set a waiting job IN_PROGRESS, as ComfyUI runs it under this prompt_id; return whether it was waiting."""
        values = {"prompt_id": prompt_id, "backend": backend, "started_at": now}
        is_its_own = jobs.c.prompt_id.is_(None) | (jobs.c.prompt_id == prompt_id)
        return self._change(job_id, [JobState.IN_QUEUE.value], JobState.IN_PROGRESS, values, now, is_its_own)

    def save_progress(self, notes: Sequence[ProgressRecord]) -> None:
        """Store the progress of jobs in their present attempt, unless a later one is stored."""
        if not notes:
            return
        condition = (jobs.c.id == bindparam("of_job")) & (jobs.c.prompt_id == bindparam("of_prompt"))
        condition &= jobs.c.progress_number.is_(None) | (jobs.c.progress_number < bindparam("of_number"))
        rows = [
            {
                "of_job": note.job_id,
                "of_prompt": note.prompt_id,
                "of_number": note.number,
                "progress": note.data,
                "progress_number": note.number,
            }
            # Always in the same order, because transactions wait for each other's rows.
            for note in sorted(notes, key=lambda note: note.job_id)
        ]
        with self._writing() as connection:
            connection.execute(update(jobs).where(condition), rows)

    def set_prompt_id(self, job_id: str, prompt_id: str | None, backend: str | None, *, expected: str | None) -> bool:
        """Claim a waiting job for a backend, before it is sent there, or release the claim.

        Args:
            job_id: the job.
            prompt_id: its id at the backend; None if it is not there.
            backend: the URL of the ComfyUI, or the name of the endpoint.
            expected: the prompt_id that it has so far.

        Returns:
            Whether it was waiting, with the prompt_id `expected`.
        """
        condition = (jobs.c.id == job_id) & (jobs.c.state == JobState.IN_QUEUE.value)
        condition &= jobs.c.prompt_id.is_(None) if expected is None else jobs.c.prompt_id == expected
        values = {"prompt_id": prompt_id, "backend": backend, **_NO_PROGRESS}
        with self._writing() as connection:
            return bool(connection.execute(update(jobs).where(condition).values(**values)).rowcount)

    def requeue(self, job_id: str, now: float, *, keep_claim: bool = False) -> bool:
        """Put a running job back into the queue, with or without its claim; return whether it was running."""
        values = {"started_at": None, **_NO_PROGRESS, **({} if keep_claim else dict.fromkeys(("prompt_id", "backend")))}
        values["retries"] = jobs.c.retries + 1
        return self._change(job_id, [JobState.IN_PROGRESS.value], JobState.IN_QUEUE, values, now)

    def finish(
        self,
        job_id: str,
        state: JobState,
        now: float,
        *,
        output: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
        ran_from: float | None = None,
        progress: ProgressRecord | None = None,
        only_waiting: bool = False,
        accepted_at: float | None = None,
    ) -> bool:
        """End a job, and store its webhook in the same transaction; return whether the job had not ended.

        Args:
            job_id: the job.
            state: how it ended.
            now: when.
            output: what it made.
            error: why it failed.
            ran_from: when ComfyUI began to run it, if it did; this replaces `started_at`.
            progress: its last progress.
            only_waiting: whether to leave a running job alone.
            accepted_at: if given, leave a job alone that was retried since.
        """
        values = {"ended_at": now, "output": output, "error": error}
        values |= {} if ran_from is None else {"started_at": ran_from}
        values |= {} if progress is None else {"progress": progress.data, "progress_number": progress.number}
        condition = None if accepted_at is None else jobs.c.created_at == accepted_at
        return self._change(job_id, [JobState.IN_QUEUE.value] if only_waiting else _OPEN, state, values, now, condition)

    def retry(self, job_id: str, now: float) -> bool:
        """Put a job that failed or timed out back into the queue; return whether it had."""
        values = dict.fromkeys(("started_at", "ended_at", "prompt_id", "backend", "output", "error"))
        changed = {**values, **_NO_PROGRESS, "created_at": now, "retries": jobs.c.retries + 1}
        return self._change(job_id, [JobState.FAILED.value, JobState.TIMED_OUT.value], JobState.IN_QUEUE, changed, now)

    def _change(
        self,
        job_id: str,
        states: Iterable[str],
        state: JobState,
        values: Mapping[str, Any],
        now: float,
        only_if: ColumnElement[bool] | None = None,
    ) -> bool:
        """Change the state of a job that is in one of `states`; return whether it was."""
        condition = (jobs.c.id == job_id) & jobs.c.state.in_(list(states))
        if only_if is not None:
            condition &= only_if
        with self._writing() as connection:
            # Read before the update, which may change `started_at`.
            times = connection.execute(_TIMES.where(condition).with_for_update()).one_or_none()
            if times is None:
                return False
            connection.execute(update(jobs).where(condition).values(state=state.value, **values))
            _add_event(connection, job_id, state, now)
            if state is JobState.IN_QUEUE:
                # The webhook of the new end replaces one that is not sent yet.
                connection.execute(delete(webhook_deliveries).where(webhook_deliveries.c.job_id == job_id))
            is_due = state.is_terminal and _add_webhook(connection, job_id, now)
            if state.is_terminal:
                add_seconds(connection, seconds_by_stage(*times, now, values.get("output")))
        self.on_change(job_id)
        if is_due:
            self.on_webhook_due()
        return True

    # --------------------------------------------------------------------------------------------- expiry

    def expired(self, now: float) -> Sequence[str]:
        """Return the jobs whose retention time is over, unless their webhook is still to be sent."""
        with self._reading() as connection:
            return list(connection.execute(select(jobs.c.id).where(_has_expired(now))).scalars())

    def remove_expired(self, job_ids: Iterable[str], now: float) -> Sequence[str]:
        """Delete those of these jobs that are still expired; return their ids."""
        removed = []
        for job_id in job_ids:
            with self._writing() as connection:
                if connection.execute(delete(jobs).where(jobs.c.id == job_id, _has_expired(now))).rowcount:
                    removed.append(job_id)
        for job_id in removed:
            self.on_change(job_id)
        return removed

    def delete_ended(self, job_id: str, owner: str) -> bool:
        """Delete a job of an owner that has ended and whose webhook was sent; return whether there was one."""
        with self._writing() as connection:
            is_gone = bool(connection.execute(delete(jobs).where(_is_replaceable(job_id, owner))).rowcount)
        if is_gone:
            self.on_change(job_id)
        return is_gone

    # --------------------------------------------------------------------------------------------- events

    def events_of(self, job_id: str, after: int = 0) -> Sequence[tuple[int, str, Mapping[str, Any]]]:
        """Return `(number, type, data)` of each change of a job's state after a number."""
        query = select(events).where(events.c.job_id == job_id, events.c.number > after).order_by(events.c.number)
        with self._reading() as connection:
            return [(row.number, row.type, row.data) for row in connection.execute(query)]

    # ------------------------------------------------------------------------------------------- webhooks

    def due_deliveries(self, now: float, limit: int = 100) -> Sequence[WebhookDelivery]:
        """Return webhooks that are due, the oldest first."""
        table = webhook_deliveries
        query = select(table).where(table.c.done_at.is_(None), table.c.due_at <= now).order_by(table.c.due_at)
        with self._reading() as connection:
            rows = connection.execute(query.limit(limit))
            return [WebhookDelivery(row.id, row.job_id, row.attempts, row.due_at) for row in rows]

    def claim_deliveries(self, now: float, until: float, limit: int) -> Sequence[WebhookDelivery]:
        """Claim webhooks that are due, so that no other gateway sends them until a time; return those claimed.

        `record_attempt` ends the claim. If it is not called, the webhook is due again when the claim expires.
        """
        table = webhook_deliveries
        taken = []
        for delivery in self.due_deliveries(now, limit):
            # Another gateway may have claimed it first.
            condition = (table.c.id == delivery.id) & table.c.done_at.is_(None) & (table.c.due_at == delivery.due_at)
            with self._writing() as connection:
                if connection.execute(update(table).where(condition).values(due_at=until)).rowcount:
                    taken.append(replace(delivery, due_at=until))
        return taken

    def claimed_deliveries(self, until: Collection[float]) -> Sequence[WebhookDelivery]:
        """Return the webhooks that were claimed until one of these times and are not done."""
        table = webhook_deliveries
        query = select(table).where(table.c.done_at.is_(None), table.c.due_at.in_(until)).order_by(table.c.due_at)
        with self._reading() as connection:
            rows = connection.execute(query)
            return [WebhookDelivery(row.id, row.job_id, row.attempts, row.due_at) for row in rows]

    def pending_deliveries(self) -> int:
        """Return the number of webhooks that are neither accepted nor given up."""
        query = select(func.count()).where(webhook_deliveries.c.done_at.is_(None))
        with self._reading() as connection:
            count: int = connection.execute(query).scalar_one()
        return count

    def next_delivery_at(self, after: float) -> float | None:
        """Return when the next webhook becomes due after a time, None if none does."""
        table = webhook_deliveries
        query = select(func.min(table.c.due_at)).where(table.c.done_at.is_(None), table.c.due_at > after)
        with self._reading() as connection:
            at: float | None = connection.execute(query).scalar_one()
        return at

    def record_attempt(self, delivery_id: str, now: float, *, retry_at: float | None = None, error: str = "") -> None:
        """Record that a webhook was sent: it is done (accepted or given up), or due again at `retry_at`."""
        table = webhook_deliveries
        values: dict[str, Any] = {"attempts": table.c.attempts + 1, "last_error": error or None}
        values |= {"done_at": now} if retry_at is None else {"due_at": retry_at}
        with self._writing() as connection:
            connection.execute(update(table).where(table.c.id == delivery_id).values(**values))

    # ---------------------------------------------------------------------------------------------- rows

    def _columns(self, record: JobRecord) -> dict[str, Any]:
        columns = {name: getattr(record, name) for name in set(jobs.c.keys()) - {"state", "request"}}
        encrypted = self._cipher.encrypt(json.dumps(record.request).encode())
        return {**columns, "state": record.state.value, "request": encrypted}

    def _records(self, query: Select[Any]) -> Sequence[JobRecord]:
        with self._reading() as connection:
            return [_record(row) for row in connection.execute(query)]


def _record(row: Row[Any]) -> JobRecord:
    columns = {column.key: row._mapping[column] for column in _SHOWN}
    return JobRecord(**{**columns, "state": JobState(columns["state"])})


def _is_of(owners: Collection[str] | None) -> ColumnElement[bool]:
    """Return the condition for the jobs of these owners; for all jobs if None."""
    return true() if owners is None else jobs.c.owner.in_(owners)


def _has_expired(now: float) -> Any:
    return (jobs.c.ended_at + jobs.c.retention_s < now) & ~_has_webhook_to_send()


def _is_replaceable(job_id: str, owner: str) -> ColumnElement[bool]:
    is_it = (jobs.c.id == job_id) & (jobs.c.owner == owner) & jobs.c.state.not_in(_OPEN)
    return is_it & ~_has_webhook_to_send()


def _has_webhook_to_send() -> ColumnElement[bool]:
    waiting = select(webhook_deliveries.c.job_id).where(webhook_deliveries.c.done_at.is_(None))
    return jobs.c.id.in_(waiting)


def _check_queue_size(
    connection: Connection, new: Sequence[JobRecord], max_waiting: int | None, max_of_owner: int | None
) -> None:
    """Raise `QueueFull` if these jobs cannot wait too; no other job is added until the transaction ends."""
    if not new or (max_waiting is None and max_of_owner is None):
        return
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_QUEUE_LOCK})"))
    _check_limit(connection, len(new), max_waiting, "jobs", true())
    _check_limit(connection, len(new), max_of_owner, "jobs of this key", jobs.c.owner == new[0].owner)


def _check_limit(
    connection: Connection, wanted: int, limit: int | None, what: str, condition: ColumnElement[bool]
) -> None:
    if limit is None:
        return
    query = select(func.count()).select_from(jobs).where(jobs.c.state == JobState.IN_QUEUE.value, condition)
    waiting = connection.execute(query).scalar_one()
    if waiting >= limit:
        raise QueueFull(f"{waiting} {what} are waiting already", hint="Try again in a while")
    if waiting + wanted > limit:
        raise QueueFull(
            f"{waiting} {what} are waiting already, and with these {wanted} there would be more than {limit}",
            hint="Try again in a while, or with fewer",
        )


def _add_event(connection: Connection, job_id: str, state: JobState, now: float) -> None:
    """Add the event of a change; its number is larger than the job's last one, whatever the clock says."""
    last = select(func.max(events.c.number)).where(events.c.job_id == job_id)
    number = max(event_number(now), (connection.execute(last).scalar_one() or 0) + 1)
    row = {"job_id": job_id, "number": number, "type": STATUS, "data": {"status": state.value}}
    connection.execute(insert(events).values(**row))


def _add_webhook(connection: Connection, job_id: str, now: float) -> bool:
    """Add the webhook for the end of a job, if it has one; return whether it has."""
    columns = [literal(f"msg_{uuid.uuid4().hex}"), jobs.c.id, literal(0), literal(now)]
    wanted = select(*columns).where(jobs.c.id == job_id, jobs.c.webhook)
    names = ["id", "job_id", "attempts", "due_at"]
    return bool(connection.execute(insert(webhook_deliveries).from_select(names, wanted)).rowcount)


def _nothing(*_args: object) -> None:
    """Ignore a callback."""

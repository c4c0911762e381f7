"""
The functions, triggers and views of PostgreSQL, as plain SQL, because models cannot declare them.

`kkt_insert_receipts` stores receipts: it takes the lock, checks the settings that make a commit durable, looks for
known ids and for room, and gives each receipt its timestamp. Statement triggers write the facts to `buffer_events` and
what has changed to `buffer_changes`, whichever program changed the rows. `trg_guard_*` refuse changes that would break
an invariant, with SQLSTATEs of their own. The migrations have their own copies of these texts; a test compares them.
"""

import re
from collections.abc import Mapping

from kkt_buffer.config import CONFIG_RULES

# SQLSTATEs of the guards. In class 23 the driver raises an IntegrityError; class 55 is "not in prerequisite state".
ACKNOWLEDGED, REFUSED, FULL, UNSAFE = "23K01", "23K02", "23K03", "55K01"

# What makes a commit unsafe, in words; NULL if it is safe. `replicas`: how many must confirm it.
# https://www.postgresql.org/docs/current/runtime-config-wal.html, runtime-config-replication.html
_UNSAFE = """\
CASE
    WHEN current_setting('fsync') <> 'on' THEN 'fsync is off'
    WHEN current_setting('full_page_writes') <> 'on' THEN 'full_page_writes is off'
    WHEN current_setting('synchronous_commit') = 'off' THEN 'synchronous_commit is off'
    WHEN current_setting('transaction_isolation') <> 'read committed' THEN 'the isolation level is not read committed'
    WHEN replicas > 0 AND current_setting('synchronous_commit') = 'local' THEN 'synchronous_commit is local'
    WHEN replicas > CASE WHEN current_setting('synchronous_standby_names') = '' THEN 0 ELSE COALESCE((regexp_match(
        current_setting('synchronous_standby_names'), '^\\s*(?:ANY|FIRST)?\\s*(\\d+)\\s*\\(', 'i'))[1]::integer, 1) END
        THEN format('synchronous_standby_names is %L', current_setting('synchronous_standby_names'))
END"""


def unsafe_commit(replicas: int) -> str:
    """The SQL term that tells what makes a commit unsafe, with which `replicas` must confirm it."""
    return _UNSAFE.replace("replicas >", f"{replicas} >")


def _setting(key: str) -> str:
    """A setting as a number: the default if it is not stored, 0 if it is no number."""
    value = f"SELECT CASE WHEN value ~ '^\\d{{1,10}}$' THEN value::bigint ELSE 0 END FROM config WHERE key = '{key}'"
    return f"COALESCE(({value}), {CONFIG_RULES[key].default})"


def _count(rows: str, status: str) -> str:
    return f"COUNT(*) FILTER (WHERE {rows}status = '{status}')"


_TABLES = "'receipts'::regclass, 'dlq'::regclass, 'buffer_events'::regclass, 'buffer_changes'::regclass"
_HLC = "MAX(ARRAY[hlc_local_time, hlc_logical_counter]) FILTER (WHERE hlc_local_time IS NOT NULL)"
_SUM = f"""\
SUM(pending)::bigint, SUM(syncing)::bigint, SUM(synced)::bigint, SUM(failed)::bigint,
        SUM(open_dead_letters)::bigint, ({_HLC})[1], ({_HLC})[2], MAX(last_synced_at)"""
_STATUSES = ("pending", "syncing", "synced", "failed")
_ADDED = ", ".join(_count("", status) for status in _STATUSES)
_REMOVED = ", ".join(f"-{_count('', status)}" for status in _STATUSES)
_MOVED = ",\n        ".join(f"{_count('later.', status)} - {_count('earlier.', status)}" for status in _STATUSES)
_BOTH = "new_rows AS later JOIN old_rows AS earlier USING (id)"
_FOLD = "IF random() < 0.02 THEN PERFORM kkt_fold_changes(); END IF;"
_TRIGGER = "RETURNS trigger LANGUAGE plpgsql AS $$"

FUNCTIONS: Mapping[str, str] = {
    # An advisory lock: nothing is written for it, so nothing rots under a long snapshot. Its key is that of the table.
    "kkt_lock_buffer": """\
CREATE FUNCTION kkt_lock_buffer() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock('receipts'::regclass::oid::bigint);
END $$""",
    "kkt_unsafe_commit": f"""\
CREATE FUNCTION kkt_unsafe_commit(replicas integer) RETURNS text LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN COALESCE({_UNSAFE},
        (SELECT 'the table ' || relname || ' is not logged' FROM pg_class
        WHERE oid IN ({_TABLES}) AND relpersistence <> 'p' LIMIT 1));
END $$""",
    "kkt_buffer_capacity": f"""\
CREATE FUNCTION kkt_buffer_capacity() RETURNS bigint LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN {_setting("buffer_capacity")};
END $$""",
    # `known`: the ids that are stored already. `room`: for how many more receipts there was room, if too few. Nothing
    # was stored if there is either.
    "kkt_insert_receipts": f"""\
CREATE FUNCTION kkt_insert_receipts(
    ids text[], pos_ids text[], documents text[], digests text[], held boolean[], at bigint, replicas integer,
    patience text, OUT known text[], OUT room bigint
) LANGUAGE plpgsql SET jit = off SET kkt_buffer.has_room = 'yes' AS $$
DECLARE
    last record;
    moment bigint;
    problem text;
BEGIN
    PERFORM set_config('lock_timeout', patience, true);
    PERFORM kkt_lock_buffer();
    problem := kkt_unsafe_commit(replicas);
    IF problem IS NOT NULL THEN
        RAISE EXCEPTION '%', problem USING ERRCODE = '{UNSAFE}';
    END IF;
    SELECT array_agg(id) INTO known FROM receipts WHERE id = ANY (ids);
    IF known IS NOT NULL THEN
        RETURN;
    END IF;
    SELECT hlc_local_time, hlc_logical_counter, kkt_buffer_capacity() - pending - syncing AS room INTO last
    FROM kkt_state();
    IF last.room < cardinality(ids) THEN
        room := last.room;
        RETURN;
    END IF;
    moment := COALESCE(at, floor(extract(epoch FROM clock_timestamp()))::bigint);
    INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc, digest, held_at)
    SELECT
        id, pos_id, moment, GREATEST(last.hlc_local_time, moment),
        CASE WHEN moment > last.hlc_local_time THEN 0 ELSE last.hlc_logical_counter + 1 END + place - 1,
        document, digest, CASE WHEN hold THEN moment END
    FROM unnest(ids, pos_ids, documents, digests, held) WITH ORDINALITY
        AS given (id, pos_id, document, digest, hold, place);
END $$""",
    # The state is the sum of all rows. Those below `folded_below` of the newest folded row are in that row, and dead. A
    # long snapshot keeps them, so they are not even looked at. After a restore into another server, whose transactions
    # have other numbers, the folded row is none of this server's (its xmin differs), and all rows are read.
    "kkt_live_changes": """\
CREATE FUNCTION kkt_live_changes() RETURNS xid8 LANGUAGE plpgsql STABLE SET enable_seqscan = off AS $$
BEGIN
    RETURN COALESCE((
        SELECT CASE WHEN xmin::text::numeric = transaction_id::text::numeric % 4294967296 THEN folded_below END
        FROM buffer_changes WHERE folded_below IS NOT NULL ORDER BY folded_below DESC LIMIT 1), '0');
END $$""",
    "kkt_state": f"""\
CREATE FUNCTION kkt_state() RETURNS TABLE (
    id integer, pending bigint, syncing bigint, synced bigint, failed bigint, open_dead_letters bigint,
    hlc_local_time bigint, hlc_logical_counter bigint, last_synced_at bigint
) LANGUAGE plpgsql STABLE SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    from_here xid8 := kkt_live_changes();
BEGIN
    RETURN QUERY SELECT 1, {_SUM}
    FROM buffer_changes WHERE transaction_id >= from_here;
END $$""",
    # Replaces all rows by their sum, one transaction at a time. The rows of transactions that are not committed yet
    # stay; their numbers are not below the xmin of the snapshot of this statement.
    "kkt_fold_changes": f"""\
CREATE FUNCTION kkt_fold_changes() RETURNS void LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    from_here xid8 := kkt_live_changes();
BEGIN
    IF current_setting('transaction_isolation') = 'read committed'
        AND pg_try_advisory_xact_lock('buffer_changes'::regclass::oid::bigint) THEN
        WITH gone AS (DELETE FROM buffer_changes WHERE transaction_id >= from_here RETURNING *)
        INSERT INTO buffer_changes (folded_below, pending, syncing, synced, failed, open_dead_letters, hlc_local_time,
            hlc_logical_counter, last_synced_at)
        SELECT pg_snapshot_xmin(pg_current_snapshot()), {_SUM}
        FROM gone;
    END IF;
END $$""",
    # Facts and changes. `kkt_insert_receipts` has looked for room before; whoever else inserts is checked here.
    "kkt_receipts_added": f"""\
CREATE FUNCTION kkt_receipts_added() {_TRIGGER}
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    SELECT 'receipt_added', id, created_at, json_build_object('pos_id', pos_id)
    FROM new_rows ORDER BY hlc_local_time, hlc_logical_counter;
    INSERT INTO buffer_changes (
        pending, syncing, synced, failed, hlc_local_time, hlc_logical_counter, last_synced_at)
    SELECT {_ADDED}, ({_HLC})[1], ({_HLC})[2], MAX(synced_at)
    FROM new_rows HAVING COUNT(*) > 0;
    IF COALESCE(current_setting('kkt_buffer.has_room', true), '') <> 'yes'
        AND (SELECT pending + syncing FROM kkt_state()) > kkt_buffer_capacity()
        AND EXISTS (SELECT 1 FROM new_rows WHERE status IN ('pending', 'syncing')) THEN
        RAISE EXCEPTION 'Buffer full' USING ERRCODE = '{FULL}';
    END IF;
    {_FOLD}
    RETURN NULL;
END $$""",
    "kkt_receipts_changed": f"""\
CREATE FUNCTION kkt_receipts_changed() {_TRIGGER}
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    SELECT fact, id, at, metadata
    FROM {_BOTH} CROSS JOIN LATERAL (VALUES
        ('receipt_attempt_failed', later.retry_count > earlier.retry_count, later.changed_at,
            json_build_object('retry_count', later.retry_count, 'error', later.last_error)),
        ('receipt_completed', earlier.held_at IS NOT NULL AND later.held_at IS NULL AND later.status <> 'synced',
            later.changed_at, CASE WHEN later.digest IS NOT NULL THEN json_build_object('digest', later.digest) END),
        ('receipt_synced', later.status = 'synced' AND earlier.status <> 'synced', later.synced_at,
            json_build_object('server_time', later.hlc_server_time, 'retry_count', later.retry_count))
    ) AS facts (fact, is_new, given, metadata), COALESCE(given, floor(extract(epoch FROM now()))::bigint) AS at
    WHERE is_new ORDER BY later.hlc_local_time, later.hlc_logical_counter;
    INSERT INTO buffer_changes (pending, syncing, synced, failed, last_synced_at)
    SELECT
        {_MOVED},
        MAX(later.synced_at)
    FROM {_BOTH} WHERE later.status <> earlier.status HAVING COUNT(*) > 0;
    {_FOLD}
    RETURN NULL;
END $$""",
    "kkt_receipts_removed": f"""\
CREATE FUNCTION kkt_receipts_removed() {_TRIGGER}
BEGIN
    INSERT INTO buffer_changes (pending, syncing, synced, failed)
    SELECT {_REMOVED}
    FROM old_rows HAVING COUNT(*) > 0;
    RETURN NULL;
END $$""",
    "kkt_dead_letters_added": f"""\
CREATE FUNCTION kkt_dead_letters_added() {_TRIGGER}
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    SELECT 'receipt_failed', original_receipt_id, failed_at,
        json_build_object('reason', reason, 'retry_attempts', retry_attempts)
    FROM new_rows;
    INSERT INTO buffer_changes (open_dead_letters)
    SELECT COUNT(*) FROM new_rows WHERE resolved_at IS NULL HAVING COUNT(*) > 0;
    RETURN NULL;
END $$""",
    "kkt_dead_letters_changed": f"""\
CREATE FUNCTION kkt_dead_letters_changed() {_TRIGGER}
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    SELECT 'receipt_' || COALESCE(later.resolution, 'resolved'), later.original_receipt_id, later.resolved_at,
        json_build_object('actor', later.resolved_by, 'reason', later.resolution_reason)
    FROM {_BOTH} WHERE earlier.resolved_at IS NULL AND later.resolved_at IS NOT NULL
        AND COALESCE(later.resolution, 'resolved') IN ('requeued', 'resolved');
    INSERT INTO buffer_changes (open_dead_letters)
    SELECT COUNT(*) FILTER (WHERE later.resolved_at IS NULL) - COUNT(*) FILTER (WHERE earlier.resolved_at IS NULL)
    FROM {_BOTH} WHERE (later.resolved_at IS NULL) <> (earlier.resolved_at IS NULL) HAVING COUNT(*) > 0;
    RETURN NULL;
END $$""",
    "kkt_dead_letters_removed": f"""\
CREATE FUNCTION kkt_dead_letters_removed() {_TRIGGER}
BEGIN
    INSERT INTO buffer_changes (open_dead_letters)
    SELECT -COUNT(*) FROM old_rows WHERE resolved_at IS NULL HAVING COUNT(*) > 0;
    RETURN NULL;
END $$""",
    # Guards. A stale snapshot would not see the receipts of the transaction that had the lock before.
    "kkt_guard_insert": f"""\
CREATE FUNCTION kkt_guard_insert() {_TRIGGER}
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'the isolation level is not read committed' USING ERRCODE = '{UNSAFE}';
    END IF;
    PERFORM kkt_lock_buffer();
    RETURN NULL;
END $$""",
    "kkt_guard": f"""\
CREATE FUNCTION kkt_guard() {_TRIGGER}
BEGIN
    RAISE EXCEPTION '%', TG_ARGV[0] USING ERRCODE = COALESCE(TG_ARGV[1], '{REFUSED}');
END $$""",
    "kkt_guard_dead_letter": f"""\
CREATE FUNCTION kkt_guard_dead_letter() {_TRIGGER}
BEGIN
    IF EXISTS (SELECT 1 FROM receipts WHERE id = NEW.original_receipt_id AND status IN ('synced', 'failed')) THEN
        RAISE EXCEPTION 'a synced or failed receipt cannot be dead-lettered' USING ERRCODE = '{REFUSED}';
    END IF;
    RETURN NEW;
END $$""",
    "kkt_guard_failed": f"""\
CREATE FUNCTION kkt_guard_failed() {_TRIGGER}
BEGIN
    IF (NEW.status = 'failed') <> EXISTS (
        SELECT 1 FROM dlq WHERE original_receipt_id = NEW.id AND resolved_at IS NULL) THEN
        RAISE EXCEPTION '%', CASE WHEN NEW.status = 'failed' THEN 'a receipt fails through its dead letter: insert that'
            ELSE 'a failed receipt has an open dead letter: resolve that' END || ' first' USING ERRCODE = '{REFUSED}';
    END IF;
    RETURN NEW;
END $$""",
    "kkt_guard_event_removed": f"""\
CREATE FUNCTION kkt_guard_event_removed() {_TRIGGER}
BEGIN
    IF OLD.timestamp > extract(epoch FROM now()) - 86400 * {_setting("retention_events_days")} THEN
        RAISE EXCEPTION 'an event cannot be deleted before retention_events_days have passed'
            USING ERRCODE = '{REFUSED}';
    END IF;
    RETURN OLD;
END $$""",
}


def _after(event: str, function: str, rows: str) -> str:
    return f"AFTER {event} REFERENCING {rows} FOR EACH STATEMENT EXECUTE FUNCTION {function}()"


def _guard(event: str, message: str, when: str, code: str = REFUSED) -> str:
    return f"BEFORE {event} FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION kkt_guard('{message}', '{code}')"


_NEW, _OLD = "NEW TABLE AS new_rows", "OLD TABLE AS old_rows"

# What follows CREATE TRIGGER and the name.
TRIGGERS: Mapping[str, str] = {
    "trg_receipts_added": _after("INSERT ON receipts", "kkt_receipts_added", _NEW),
    "trg_receipts_changed": _after("UPDATE ON receipts", "kkt_receipts_changed", f"{_OLD} {_NEW}"),
    "trg_receipts_removed": _after("DELETE ON receipts", "kkt_receipts_removed", _OLD),
    "trg_dead_letters_added": _after("INSERT ON dlq", "kkt_dead_letters_added", _NEW),
    "trg_dead_letters_changed": _after("UPDATE ON dlq", "kkt_dead_letters_changed", f"{_OLD} {_NEW}"),
    "trg_dead_letters_removed": _after("DELETE ON dlq", "kkt_dead_letters_removed", _OLD),
    "trg_guard_insert": "BEFORE INSERT ON receipts FOR EACH STATEMENT EXECUTE FUNCTION kkt_guard_insert()",
    "trg_guard_acknowledged": _guard(
        "UPDATE ON receipts",
        "an acknowledged receipt does not change",
        "(NEW.id, NEW.pos_id, NEW.created_at, NEW.hlc_local_time, NEW.hlc_logical_counter) IS DISTINCT FROM"
        " (OLD.id, OLD.pos_id, OLD.created_at, OLD.hlc_local_time, OLD.hlc_logical_counter)"
        " OR (OLD.held_at IS NULL AND (NEW.fiscal_doc, NEW.digest, NEW.inserted_digest) IS DISTINCT FROM"
        " (OLD.fiscal_doc, OLD.digest, OLD.inserted_digest))",
        ACKNOWLEDGED,
    ),
    "trg_guard_held": _guard(
        "UPDATE ON receipts",
        "held_at is set when a receipt is stored, never later",
        "NEW.held_at IS NOT NULL AND NEW.held_at IS DISTINCT FROM OLD.held_at",
    ),
    "trg_guard_undelivered": _guard(
        "DELETE ON receipts", "an undelivered receipt cannot be deleted", "OLD.status IN ('pending', 'syncing')"
    ),
    "trg_guard_dead_letter": "BEFORE INSERT ON dlq FOR EACH ROW WHEN (NEW.resolved_at IS NULL)"
    " EXECUTE FUNCTION kkt_guard_dead_letter()",
    "trg_guard_failed": "BEFORE UPDATE ON receipts FOR EACH ROW"
    " WHEN ((NEW.status = 'failed') <> (OLD.status = 'failed')) EXECUTE FUNCTION kkt_guard_failed()",
    "trg_guard_event_changed": _guard("UPDATE ON buffer_events", "buffer_events is append-only", "true"),
    "trg_guard_event_removed": "BEFORE DELETE ON buffer_events FOR EACH ROW EXECUTE FUNCTION kkt_guard_event_removed()",
    # TRUNCATE passes the triggers of rows by.
    **{
        f"trg_guard_truncate_{table}": f"BEFORE TRUNCATE ON {table} FOR EACH STATEMENT"
        " EXECUTE FUNCTION kkt_guard('a buffer is pruned, not truncated')"
        for table in ("receipts", "dlq", "buffer_events", "buffer_changes")
    },
}

VIEWS: Mapping[str, str] = {
    "buffer_state": "SELECT * FROM kkt_state()",
    "v_buffer_status": """\
SELECT
    pending + syncing + synced + failed AS total_receipts,
    pending, syncing, synced, failed, open_dead_letters AS dlq_size, capacity,
    ROUND(100.0 * (pending + syncing) / GREATEST(capacity, 1), 2) AS percent_full
FROM buffer_state, kkt_buffer_capacity() AS capacity""",
}


def statements(schema: str) -> list[str]:
    """
    What creates all of them in a schema, after the tables.

    Functions search that schema alone, whoever calls them; pg_temp last, so that no temporary table hides a table.
    """
    path = f"SET search_path = {schema}, pg_temp AS $$"
    return [
        "ALTER TABLE receipts SET (toast_tuple_target = 256)",  # documents are compressed: a third less WAL
        *(sql.replace("AS $$", path, 1) for sql in FUNCTIONS.values()),
        *(f"CREATE VIEW {name} AS {_qualified(sql, schema)}" for name, sql in VIEWS.items()),
        *(f"CREATE TRIGGER {name} {_qualified(sql, schema)}" for name, sql in TRIGGERS.items()),
    ]


def _qualified(sql: str, schema: str) -> str:
    return re.sub(r"\b(kkt_\w+\()", rf"{schema}.\1", sql)

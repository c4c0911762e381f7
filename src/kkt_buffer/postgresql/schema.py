"""
The functions, triggers and views of PostgreSQL, as plain SQL, because models cannot declare them.

`kkt_insert_receipts` stores receipts: it takes the lock, checks the settings that make a commit durable, looks for
known ids and for room, and gives each receipt its timestamp. Statement triggers write the facts to `buffer_events` and
what has changed to `buffer_changes`, whichever program changed the rows. `trg_guard_*` refuse changes that would break
an invariant, with SQLSTATEs of their own. The migrations have their own copies of these texts; a test compares them.

Every function runs with the `search_path` of its schema, whoever calls it.
"""

import re
from collections.abc import Mapping

from kkt_buffer.config import CONFIG_RULES

# Used if the setting is not stored.
_CAPACITY = CONFIG_RULES["buffer_capacity"].default
_RETENTION = CONFIG_RULES["retention_events_days"].default

# SQLSTATEs of the guards. Class 23: the driver raises an IntegrityError.
ACKNOWLEDGED = "23K01"
REFUSED = "23K02"
FULL = "23K03"
UNSAFE = "55K01"  # class 55, object not in prerequisite state

# What makes a commit unsafe, in words; NULL if it is safe. `replicas`: how many must confirm it.
# https://www.postgresql.org/docs/current/runtime-config-wal.html, runtime-config-replication.html
_UNSAFE = """\
CASE
    WHEN current_setting('fsync') <> 'on' THEN 'fsync is off'
    WHEN current_setting('full_page_writes') <> 'on' THEN 'full_page_writes is off'
    WHEN current_setting('synchronous_commit') = 'off' THEN 'synchronous_commit is off'
    WHEN current_setting('transaction_isolation') <> 'read committed'
        THEN 'transaction_isolation is ' || current_setting('transaction_isolation') || ', not read committed'
    WHEN replicas > 0 AND current_setting('synchronous_commit') = 'local' THEN 'synchronous_commit is local'
    WHEN replicas > CASE WHEN current_setting('synchronous_standby_names') = '' THEN 0 ELSE COALESCE((regexp_match(
        current_setting('synchronous_standby_names'), '^\\s*(?:ANY|FIRST)?\\s*(\\d+)\\s*\\(', 'i'))[1]::integer, 1) END
        THEN 'synchronous_standby_names is ''' || current_setting('synchronous_standby_names') || ''''
END"""


def unsafe_commit(replicas: int) -> str:
    """The SQL term that tells what makes a commit unsafe, with which `replicas` must confirm it."""
    return _UNSAFE.replace("replicas >", f"{replicas} >")


_TABLES = ", ".join(f"'{table}'::regclass" for table in ("receipts", "dlq", "buffer_events", "buffer_changes"))

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
        (SELECT 'the table ' || relname || ' is not logged' FROM pg_class WHERE relpersistence <> 'p' AND oid IN (
            {_TABLES}) LIMIT 1));
END $$""",
    # `known`: the ids that are stored already. `room`: for how many more receipts there was room, if too few. Nothing
    # was stored if there is either.
    "kkt_insert_receipts": f"""\
CREATE FUNCTION kkt_insert_receipts(
    ids text[], pos_ids text[], documents text[], digests text[], held boolean[], at bigint, replicas integer,
    patience text, OUT known text[], OUT room bigint
) LANGUAGE plpgsql SET jit = off AS $$
DECLARE
    moment bigint;
    last record;
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
    FROM buffer_state;
    IF last.room < cardinality(ids) THEN
        room := last.room;
        RETURN;
    END IF;
    moment := COALESCE(at, floor(extract(epoch FROM clock_timestamp()))::bigint);
    INSERT INTO receipts (
        id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc, digest, held_at)
    SELECT
        id, pos_id, moment, GREATEST(last.hlc_local_time, moment),
        CASE WHEN moment > last.hlc_local_time THEN 0 ELSE last.hlc_logical_counter + 1 END + place - 1,
        document, digest, CASE WHEN hold THEN moment END
    FROM unnest(ids, pos_ids, documents, digests, held) WITH ORDINALITY
        AS new (id, pos_id, document, digest, hold, place);
END $$""",
    "kkt_buffer_capacity": f"""\
CREATE FUNCTION kkt_buffer_capacity() RETURNS bigint LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN COALESCE((
        SELECT CASE WHEN value ~ '^\\d{{1,10}}$' THEN value::bigint ELSE 0 END FROM config
        WHERE key = 'buffer_capacity'), {_CAPACITY});
END $$""",
    # The state: the sum of all rows. Those below `folded_below` of the newest folded row are in that row, and dead. A
    # long snapshot keeps them, so they are not even looked at. After a restore into another server, whose transactions
    # have other numbers, the folded row is none of this server's (its xmin differs), and all rows are read.
    "kkt_state": """\
CREATE FUNCTION kkt_state() RETURNS TABLE (
    id integer, pending bigint, syncing bigint, synced bigint, failed bigint, open_dead_letters bigint,
    hlc_local_time bigint, hlc_logical_counter bigint, last_synced_at bigint
) LANGUAGE plpgsql STABLE SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    from_here xid8 := kkt_live_changes();
BEGIN
    RETURN QUERY SELECT
        1, SUM(pending)::bigint, SUM(syncing)::bigint, SUM(synced)::bigint, SUM(failed)::bigint,
        SUM(open_dead_letters)::bigint,
        (MAX(ARRAY[hlc_local_time, hlc_logical_counter]) FILTER (WHERE hlc_local_time IS NOT NULL))[1],
        (MAX(ARRAY[hlc_local_time, hlc_logical_counter]) FILTER (WHERE hlc_local_time IS NOT NULL))[2],
        MAX(last_synced_at)
    FROM buffer_changes WHERE transaction_id >= from_here;
END $$""",
    "kkt_live_changes": """\
CREATE FUNCTION kkt_live_changes() RETURNS xid8 LANGUAGE plpgsql STABLE SET enable_seqscan = off AS $$
BEGIN
    RETURN COALESCE((
        SELECT CASE WHEN xmin::text::numeric = transaction_id::text::numeric % 4294967296 THEN folded_below END
        FROM buffer_changes WHERE folded_below IS NOT NULL ORDER BY folded_below DESC LIMIT 1), '0');
END $$""",
    # Replaces all rows by their sum, one transaction at a time. The rows of transactions that are not committed yet
    # stay; their numbers are not below the xmin of the snapshot of this statement.
    "kkt_fold_changes": """\
CREATE FUNCTION kkt_fold_changes() RETURNS void LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    from_here xid8 := kkt_live_changes();
BEGIN
    IF current_setting('transaction_isolation') = 'read committed'
        AND pg_try_advisory_xact_lock('buffer_changes'::regclass::oid::bigint) THEN
        WITH gone AS (DELETE FROM buffer_changes WHERE transaction_id >= from_here RETURNING *)
        INSERT INTO buffer_changes (
            folded_below, pending, syncing, synced, failed, open_dead_letters, hlc_local_time, hlc_logical_counter,
            last_synced_at)
        SELECT
            pg_snapshot_xmin(pg_current_snapshot()), SUM(pending), SUM(syncing), SUM(synced), SUM(failed),
            SUM(open_dead_letters),
            (MAX(ARRAY[hlc_local_time, hlc_logical_counter]) FILTER (WHERE hlc_local_time IS NOT NULL))[1],
            (MAX(ARRAY[hlc_local_time, hlc_logical_counter]) FILTER (WHERE hlc_local_time IS NOT NULL))[2],
            MAX(last_synced_at)
        FROM gone;
    END IF;
END $$""",
    # Facts and counts.
    "kkt_receipts_added": f"""\
CREATE FUNCTION kkt_receipts_added() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    SELECT 'receipt_added', id, created_at, json_build_object('pos_id', pos_id)
    FROM new_rows ORDER BY hlc_local_time, hlc_logical_counter;
    INSERT INTO buffer_changes (
        pending, syncing, synced, failed, hlc_local_time, hlc_logical_counter, last_synced_at)
    SELECT
        COUNT(*) FILTER (WHERE status = 'pending'), COUNT(*) FILTER (WHERE status = 'syncing'),
        COUNT(*) FILTER (WHERE status = 'synced'), COUNT(*) FILTER (WHERE status = 'failed'),
        (MAX(ARRAY[hlc_local_time, hlc_logical_counter]))[1], (MAX(ARRAY[hlc_local_time, hlc_logical_counter]))[2],
        MAX(synced_at)
    FROM new_rows HAVING COUNT(*) > 0;
    IF (SELECT pending + syncing FROM buffer_state) > kkt_buffer_capacity()
        AND EXISTS (SELECT 1 FROM new_rows WHERE status IN ('pending', 'syncing')) THEN
        RAISE EXCEPTION 'Buffer full' USING ERRCODE = '{FULL}';
    END IF;
    IF random() < 0.02 THEN
        PERFORM kkt_fold_changes();
    END IF;
    RETURN NULL;
END $$""",
    "kkt_receipts_changed": """\
CREATE FUNCTION kkt_receipts_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    SELECT fact, id, at, metadata
    FROM new_rows AS later JOIN old_rows AS earlier USING (id) CROSS JOIN LATERAL (VALUES
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
        SUM((later.status = 'pending')::integer - (earlier.status = 'pending')::integer),
        SUM((later.status = 'syncing')::integer - (earlier.status = 'syncing')::integer),
        SUM((later.status = 'synced')::integer - (earlier.status = 'synced')::integer),
        SUM((later.status = 'failed')::integer - (earlier.status = 'failed')::integer),
        MAX(later.synced_at)
    FROM new_rows AS later JOIN old_rows AS earlier USING (id)
    WHERE later.status <> earlier.status HAVING COUNT(*) > 0;
    IF random() < 0.02 THEN
        PERFORM kkt_fold_changes();
    END IF;
    RETURN NULL;
END $$""",
    "kkt_receipts_removed": """\
CREATE FUNCTION kkt_receipts_removed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO buffer_changes (pending, syncing, synced, failed)
    SELECT
        -COUNT(*) FILTER (WHERE status = 'pending'), -COUNT(*) FILTER (WHERE status = 'syncing'),
        -COUNT(*) FILTER (WHERE status = 'synced'), -COUNT(*) FILTER (WHERE status = 'failed')
    FROM old_rows HAVING COUNT(*) > 0;
    RETURN NULL;
END $$""",
    "kkt_dead_letters_added": """\
CREATE FUNCTION kkt_dead_letters_added() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    SELECT
        'receipt_failed', original_receipt_id, failed_at,
        json_build_object('reason', reason, 'retry_attempts', retry_attempts)
    FROM new_rows;
    INSERT INTO buffer_changes (open_dead_letters)
    SELECT COUNT(*) FROM new_rows WHERE resolved_at IS NULL HAVING COUNT(*) > 0;
    RETURN NULL;
END $$""",
    "kkt_dead_letters_changed": """\
CREATE FUNCTION kkt_dead_letters_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    SELECT
        CASE later.resolution WHEN 'requeued' THEN 'receipt_requeued' ELSE 'receipt_resolved' END,
        later.original_receipt_id, later.resolved_at,
        json_build_object('actor', later.resolved_by, 'reason', later.resolution_reason)
    FROM new_rows AS later JOIN old_rows AS earlier USING (id)
    WHERE earlier.resolved_at IS NULL AND later.resolved_at IS NOT NULL
        AND COALESCE(later.resolution, 'resolved') IN ('requeued', 'resolved');
    INSERT INTO buffer_changes (open_dead_letters)
    SELECT SUM((later.resolved_at IS NULL)::integer - (earlier.resolved_at IS NULL)::integer)
    FROM new_rows AS later JOIN old_rows AS earlier USING (id)
    WHERE (later.resolved_at IS NULL) <> (earlier.resolved_at IS NULL) HAVING COUNT(*) > 0;
    RETURN NULL;
END $$""",
    "kkt_dead_letters_removed": """\
CREATE FUNCTION kkt_dead_letters_removed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO buffer_changes (open_dead_letters)
    SELECT -COUNT(*) FROM old_rows WHERE resolved_at IS NULL HAVING COUNT(*) > 0;
    RETURN NULL;
END $$""",
    # Guards.
    "kkt_guard_insert": f"""\
CREATE FUNCTION kkt_guard_insert() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'transaction_isolation is %, not read committed', current_setting('transaction_isolation')
            USING ERRCODE = '{UNSAFE}';
    END IF;
    PERFORM kkt_lock_buffer();
    RETURN NULL;
END $$""",
    "kkt_guard": f"""\
CREATE FUNCTION kkt_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '%', TG_ARGV[0] USING ERRCODE = COALESCE(TG_ARGV[1], '{REFUSED}');
END $$""",
    "kkt_guard_dead_letter": f"""\
CREATE FUNCTION kkt_guard_dead_letter() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT 1 FROM receipts WHERE id = NEW.original_receipt_id AND status IN ('synced', 'failed')) THEN
        RAISE EXCEPTION 'a synced or failed receipt cannot be dead-lettered' USING ERRCODE = '{REFUSED}';
    END IF;
    RETURN NEW;
END $$""",
    "kkt_guard_failed": f"""\
CREATE FUNCTION kkt_guard_failed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (NEW.status = 'failed') <> EXISTS (
        SELECT 1 FROM dlq WHERE original_receipt_id = NEW.id AND resolved_at IS NULL) THEN
        IF NEW.status = 'failed' THEN
            RAISE EXCEPTION 'a receipt fails through its dead letter: insert that first' USING ERRCODE = '{REFUSED}';
        END IF;
        RAISE EXCEPTION 'a failed receipt has an open dead letter: resolve that first' USING ERRCODE = '{REFUSED}';
    END IF;
    RETURN NEW;
END $$""",
    "kkt_guard_event_removed": f"""\
CREATE FUNCTION kkt_guard_event_removed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.timestamp > extract(epoch FROM now()) - 86400 * COALESCE((
        SELECT CASE WHEN value ~ '^\\d{{1,10}}$' THEN value::bigint ELSE 0 END FROM config
        WHERE key = 'retention_events_days'), {_RETENTION}) THEN
        RAISE EXCEPTION 'an event cannot be deleted before retention_events_days have passed'
            USING ERRCODE = '{REFUSED}';
    END IF;
    RETURN OLD;
END $$""",
}


def _after(event: str, table: str, function: str, rows: str) -> str:
    return f"AFTER {event} ON {table} REFERENCING {rows} FOR EACH STATEMENT EXECUTE FUNCTION {function}()"


def _guard(event: str, table: str, message: str, when: str = "", code: str = "") -> str:
    condition = f" WHEN ({when})" if when else ""
    arguments = f"'{message}'" + f", '{code}'" * bool(code)
    return f"BEFORE {event} ON {table} FOR EACH ROW{condition} EXECUTE FUNCTION kkt_guard({arguments})"


_NEW, _OLD = "NEW TABLE AS new_rows", "OLD TABLE AS old_rows"

# What follows CREATE TRIGGER and the name.
TRIGGERS: Mapping[str, str] = {
    "trg_receipts_added": _after("INSERT", "receipts", "kkt_receipts_added", _NEW),
    "trg_receipts_changed": _after("UPDATE", "receipts", "kkt_receipts_changed", f"{_OLD} {_NEW}"),
    "trg_receipts_removed": _after("DELETE", "receipts", "kkt_receipts_removed", _OLD),
    "trg_dead_letters_added": _after("INSERT", "dlq", "kkt_dead_letters_added", _NEW),
    "trg_dead_letters_changed": _after("UPDATE", "dlq", "kkt_dead_letters_changed", f"{_OLD} {_NEW}"),
    "trg_dead_letters_removed": _after("DELETE", "dlq", "kkt_dead_letters_removed", _OLD),
    "trg_guard_insert": "BEFORE INSERT ON receipts FOR EACH STATEMENT EXECUTE FUNCTION kkt_guard_insert()",
    "trg_guard_acknowledged": _guard(
        "UPDATE",
        "receipts",
        "an acknowledged receipt does not change",
        "(NEW.id, NEW.pos_id, NEW.created_at, NEW.hlc_local_time, NEW.hlc_logical_counter) IS DISTINCT FROM"
        " (OLD.id, OLD.pos_id, OLD.created_at, OLD.hlc_local_time, OLD.hlc_logical_counter)"
        " OR (OLD.held_at IS NULL AND (NEW.fiscal_doc, NEW.digest, NEW.inserted_digest) IS DISTINCT FROM"
        " (OLD.fiscal_doc, OLD.digest, OLD.inserted_digest))",
        ACKNOWLEDGED,
    ),
    "trg_guard_held": _guard(
        "UPDATE",
        "receipts",
        "held_at is set when a receipt is stored, never later",
        "NEW.held_at IS NOT NULL AND NEW.held_at IS DISTINCT FROM OLD.held_at",
    ),
    "trg_guard_undelivered": _guard(
        "DELETE", "receipts", "an undelivered receipt cannot be deleted", "OLD.status IN ('pending', 'syncing')"
    ),
    "trg_guard_dead_letter": "BEFORE INSERT ON dlq FOR EACH ROW WHEN (NEW.resolved_at IS NULL)"
    " EXECUTE FUNCTION kkt_guard_dead_letter()",
    "trg_guard_failed": "BEFORE UPDATE ON receipts FOR EACH ROW"
    " WHEN ((NEW.status = 'failed') <> (OLD.status = 'failed')) EXECUTE FUNCTION kkt_guard_failed()",
    "trg_guard_event_changed": _guard("UPDATE", "buffer_events", "buffer_events is append-only"),
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

"""
Create the receipt buffer on PostgreSQL: in one step, because no server ever had an older schema. On SQLite, do nothing.

Danger: the downgrade drops every table of the buffer. It refuses while there are receipts, dead letters, events or
changed settings.
"""

import re

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

CONFIG = {
    "version": "1.0.0",
    "buffer_capacity": "200",
    "circuit_breaker_threshold": "5",
    "circuit_breaker_timeout": "60",
    "max_retry_attempts": "20",
    "retry_backoff_initial": "5",
    "retry_backoff_max": "300",
    "lease_seconds": "60",
    "retention_synced_days": "7",
    "retention_dlq_days": "90",
    "retention_events_days": "90",
    "ofd_deadline_days": "30",
}

TABLES = (
    """\
CREATE TABLE buffer_changes (
    transaction_id xid8 DEFAULT pg_current_xact_id() NOT NULL,
    folded_below xid8,
    folded_by TEXT,
    pending BIGINT DEFAULT 0 NOT NULL,
    syncing BIGINT DEFAULT 0 NOT NULL,
    synced BIGINT DEFAULT 0 NOT NULL,
    failed BIGINT DEFAULT 0 NOT NULL,
    open_dead_letters BIGINT DEFAULT 0 NOT NULL,
    hlc_local_time BIGINT,
    hlc_logical_counter BIGINT,
    last_synced_at BIGINT
)""",
    "CREATE INDEX idx_changes_folded ON buffer_changes (folded_below) WHERE folded_below IS NOT NULL",
    "CREATE INDEX idx_changes_transaction_id ON buffer_changes (transaction_id)",
    """\
CREATE TABLE buffer_events (
    id BIGSERIAL NOT NULL,
    event_type TEXT NOT NULL,
    receipt_id TEXT,
    timestamp BIGINT NOT NULL,
    metadata TEXT,
    CONSTRAINT pk_buffer_events PRIMARY KEY (id)
)""",
    "CREATE INDEX idx_events_receipt_id ON buffer_events (receipt_id) WHERE receipt_id IS NOT NULL",
    """\
CREATE INDEX idx_events_type ON buffer_events (event_type, id)
WHERE event_type NOT IN ('receipt_added', 'receipt_synced')""",
    """\
CREATE TABLE config (
    key TEXT COLLATE "C" NOT NULL,
    value TEXT NOT NULL,
    updated_at BIGINT NOT NULL,
    CONSTRAINT pk_config PRIMARY KEY (key)
)""",
    """\
CREATE TABLE receipts (
    id TEXT COLLATE "C" NOT NULL,
    pos_id TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    hlc_local_time BIGINT NOT NULL,
    hlc_logical_counter BIGINT NOT NULL,
    hlc_server_time BIGINT,
    fiscal_doc TEXT NOT NULL,
    status TEXT DEFAULT 'pending' NOT NULL,
    retry_count BIGINT DEFAULT 0 NOT NULL,
    last_error TEXT,
    synced_at BIGINT,
    changed_at BIGINT,
    next_attempt_at BIGINT,
    lease_token TEXT,
    lease_taken_at BIGINT,
    lease_expires_at BIGINT,
    held_at BIGINT,
    digest TEXT,
    inserted_digest TEXT,
    CONSTRAINT pk_receipts PRIMARY KEY (id),
    CONSTRAINT ck_receipts_status CHECK (status IN ('pending', 'syncing', 'synced', 'failed')),
    CONSTRAINT ck_receipts_retry_count CHECK (retry_count >= 0),
    CONSTRAINT ck_receipts_hlc_logical_counter CHECK (hlc_logical_counter >= 0),
    CONSTRAINT ck_receipts_synced CHECK (
        (status = 'synced') = (synced_at IS NOT NULL) AND (status = 'synced') = (hlc_server_time IS NOT NULL)),
    CONSTRAINT ck_receipts_lease CHECK (
        (status = 'syncing') = (lease_token IS NOT NULL) AND (lease_token IS NULL) = (lease_taken_at IS NULL)
        AND (lease_token IS NULL) = (lease_expires_at IS NULL)),
    CONSTRAINT ck_receipts_held CHECK (held_at IS NULL OR status IN ('pending', 'failed'))
)""",
    """\
CREATE INDEX idx_receipts_held ON receipts (hlc_local_time, hlc_logical_counter)
WHERE held_at IS NOT NULL""",
    """\
CREATE INDEX idx_receipts_hlc ON receipts (hlc_local_time, hlc_logical_counter)
WHERE status IN ('syncing', 'failed')""",
    """\
CREATE INDEX idx_receipts_lease ON receipts (lease_token, lease_expires_at, lease_taken_at)
WHERE status = 'syncing'""",
    """\
CREATE INDEX idx_receipts_pos_id ON receipts (pos_id, hlc_local_time, hlc_logical_counter, next_attempt_at)
WHERE status = 'pending' AND held_at IS NULL""",
    """\
CREATE INDEX idx_receipts_status ON receipts (hlc_local_time, hlc_logical_counter, next_attempt_at)
WHERE status = 'pending' AND held_at IS NULL""",
    "CREATE INDEX idx_receipts_synced ON receipts (synced_at) WHERE status = 'synced'",
    """\
CREATE TABLE dlq (
    id TEXT COLLATE "C" NOT NULL,
    original_receipt_id TEXT COLLATE "C" NOT NULL,
    failed_at BIGINT NOT NULL,
    reason TEXT NOT NULL,
    fiscal_doc TEXT NOT NULL,
    retry_attempts BIGINT NOT NULL,
    last_error TEXT,
    resolved_at BIGINT,
    resolved_by TEXT,
    resolution_reason TEXT,
    resolution TEXT,
    CONSTRAINT pk_dlq PRIMARY KEY (id),
    CONSTRAINT ck_dlq_resolved CHECK ((resolved_at IS NULL) = (resolved_by IS NULL)),
    CONSTRAINT fk_dlq_original_receipt_id_receipts FOREIGN KEY(original_receipt_id) REFERENCES receipts (id)
)""",
    "CREATE UNIQUE INDEX idx_dlq_open ON dlq (original_receipt_id) WHERE resolved_at IS NULL",
    "CREATE INDEX idx_dlq_original_receipt ON dlq (original_receipt_id)",
)

# Terms of more than one function: a call of a function costs more than most of them.

UNSAFE = """\
COALESCE(CASE
    WHEN current_setting('fsync') <> 'on' THEN 'fsync is off'
    WHEN current_setting('full_page_writes') <> 'on' THEN 'full_page_writes is off'
    WHEN current_setting('synchronous_commit') = 'off' THEN 'synchronous_commit is off'
    WHEN replicas > 0 AND current_setting('synchronous_commit') = 'local' THEN 'synchronous_commit is local'
    WHEN replicas > CASE WHEN current_setting('synchronous_standby_names') = '' THEN 0 ELSE COALESCE((regexp_match(
        current_setting('synchronous_standby_names'), '^\\s*(?:ANY|FIRST)?\\s*(\\d+)\\s*\\(', 'i'))[1]::integer, 1) END
        THEN format('synchronous_standby_names is %L, and require_replicas is %s',
            current_setting('synchronous_standby_names'), replicas)
END,
        (SELECT 'the table ' || relname || ' is not logged' FROM pg_class
        WHERE oid IN ('receipts'::regclass, 'dlq'::regclass, 'buffer_events'::regclass,
        'buffer_changes'::regclass) AND relpersistence <> 'p' LIMIT 1))"""

CAPACITY = """\
COALESCE((SELECT CASE WHEN value ~ '^\\d{1,10}$' THEN value::bigint ELSE 0 END FROM config
        WHERE key = 'buffer_capacity'), 200)"""

# The state is the sum of all rows. Those below `folded_below` of the newest folded row are in that row, and dead. A
# long snapshot keeps them, so they are not even looked at. After a restore into another server, whose transactions
# have other numbers, its xmin is not the one that was noted in `folded_by`, and all rows are read.
LIVE = """\
buffer_changes WHERE transaction_id >= COALESCE((
        SELECT CASE WHEN xmin::text = folded_by THEN folded_below END
        FROM buffer_changes WHERE folded_below IS NOT NULL ORDER BY folded_below DESC LIMIT 1), '0')"""

HLC = "MAX(ARRAY[hlc_local_time, hlc_logical_counter]) FILTER (WHERE hlc_local_time IS NOT NULL)"

SUMS = f"""\
SUM(pending)::bigint, SUM(syncing)::bigint, SUM(synced)::bigint, SUM(failed)::bigint, SUM(open_dead_letters)::bigint,
    ({HLC})[1], ({HLC})[2], MAX(last_synced_at)"""

FUNCTIONS = (
    # An advisory lock: nothing is written for it, so nothing rots under a long snapshot. Its key is that of the table.
    """\
CREATE FUNCTION kkt_lock_buffer() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock('receipts'::regclass::oid::bigint);
END $$""",
    f"""\
CREATE FUNCTION kkt_unsafe_commit(replicas integer) RETURNS text LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN {UNSAFE};
END $$""",
    """\
CREATE FUNCTION kkt_why_refused(replicas integer) RETURNS text LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN COALESCE(
        kkt_unsafe_commit(replicas),
        CASE WHEN current_setting('default_transaction_read_only') = 'on'
            THEN 'default_transaction_read_only is on'
            WHEN current_setting('default_transaction_isolation') <> 'read committed'
            THEN 'the isolation level is not read committed' END,
        -- sync_state is NULL for a user who may not see it.
        (SELECT format('%s of %s replicas are connected', COUNT(*), replicas) FROM pg_stat_replication
        WHERE COALESCE(sync_state, 'sync') IN ('sync', 'quorum') HAVING COUNT(*) < replicas),
        (SELECT 'a move into this buffer has begun' FROM pg_trigger
        WHERE tgname = 'trg_moving' AND tgrelid = 'receipts'::regclass));
END $$""",
    f"""\
CREATE FUNCTION kkt_buffer_capacity() RETURNS bigint LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN {CAPACITY};
END $$""",
    # Whether all of them were stored; if not, none was: an id is known already, or there is no room.
    f"""\
CREATE FUNCTION kkt_insert_receipts(
    ids text[], pos_ids text[], documents text[], digests text[], held boolean[], at bigint, replicas integer,
    patience text
) RETURNS boolean LANGUAGE plpgsql
SET jit = off SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    hlc bigint[];
    room bigint;
    moment bigint;
    stored bigint;
    problem text;
BEGIN
    IF pg_is_in_recovery() THEN  -- what it would answer below may be old
        RAISE EXCEPTION 'it is in recovery' USING ERRCODE = 'read_only_sql_transaction';
    END IF;
    -- The server reports a cancelled wait for a replica by a warning alone.
    PERFORM set_config('lock_timeout', patience, true), set_config('client_min_messages', 'warning', true);
    PERFORM pg_advisory_xact_lock('receipts'::regclass::oid::bigint);
    problem := COALESCE(CASE WHEN current_setting('transaction_isolation') <> 'read committed'
        THEN 'the isolation level is not read committed' END, {UNSAFE});
    IF problem IS NOT NULL THEN
        RAISE EXCEPTION '%', problem USING ERRCODE = '55K01';
    END IF;
    SELECT {CAPACITY} - SUM(pending) - SUM(syncing), {HLC} INTO room, hlc FROM {LIVE};
    IF room < cardinality(ids) OR EXISTS (SELECT 1 FROM receipts WHERE id = ANY (ids)) THEN
        RETURN false;
    END IF;
    moment := COALESCE(at, floor(extract(epoch FROM clock_timestamp()))::bigint);
    PERFORM set_config('kkt_buffer.is_checked', 'yes', true);  -- only a superuser could do it by SET above
    INSERT INTO receipts (id, pos_id, created_at, hlc_local_time, hlc_logical_counter, fiscal_doc, digest, held_at)
    SELECT
        id, pos_id, moment, GREATEST(hlc[1], moment),
        CASE WHEN moment > hlc[1] THEN 0 ELSE hlc[2] + 1 END + place - 1,
        document, digest, CASE WHEN hold THEN moment END
    FROM unnest(ids, pos_ids, documents, digests, held) WITH ORDINALITY
        AS given (id, pos_id, document, digest, hold, place);
    GET DIAGNOSTICS stored = ROW_COUNT;
    IF stored <> cardinality(ids) THEN  -- a trigger of the service's own has taken rows out
        RAISE EXCEPTION '% of % receipts were stored', stored, cardinality(ids) USING ERRCODE = '23K02';
    END IF;
    PERFORM set_config('kkt_buffer.is_checked', '', true);
    RETURN true;
END $$""",
    f"""\
CREATE FUNCTION kkt_state() RETURNS TABLE (
    id integer, pending bigint, syncing bigint, synced bigint, failed bigint, open_dead_letters bigint,
    hlc_local_time bigint, hlc_logical_counter bigint, last_synced_at bigint
) LANGUAGE plpgsql STABLE SET enable_seqscan = off AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY SELECT 1, {SUMS}
    FROM {LIVE};
END $$""",
    # Replaces all rows by their sum, one transaction at a time. The rows of transactions that are not committed yet
    # stay; their numbers are not below the xmin of the snapshot of this statement. `own_xmin`: of every row that this
    # transaction, or its savepoint, writes.
    f"""\
CREATE FUNCTION kkt_fold_changes(own_xmin text) RETURNS void LANGUAGE plpgsql SET enable_seqscan = off AS $$
BEGIN
    IF current_setting('transaction_isolation') = 'read committed'
        AND pg_try_advisory_xact_lock('buffer_changes'::regclass::oid::bigint) THEN
        WITH gone AS (DELETE FROM {LIVE} RETURNING *)
        INSERT INTO buffer_changes (
            folded_below, folded_by, pending, syncing, synced, failed, open_dead_letters, hlc_local_time,
            hlc_logical_counter, last_synced_at)
        SELECT pg_snapshot_xmin(pg_current_snapshot()), own_xmin, {SUMS}
        FROM gone;
    END IF;
END $$""",
    # Facts and changes. `kkt_insert_receipts` has looked for room before; every other insert is checked here.
    """\
CREATE FUNCTION kkt_receipts_added() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    own_xmin text;
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
    FROM new_rows HAVING COUNT(*) > 0 RETURNING xmin INTO own_xmin;
    IF COALESCE(current_setting('kkt_buffer.is_checked', true), '') <> 'yes'
        AND (SELECT pending + syncing FROM kkt_state()) > kkt_buffer_capacity()
        AND EXISTS (SELECT 1 FROM new_rows WHERE status IN ('pending', 'syncing')) THEN
        RAISE EXCEPTION 'Buffer full' USING ERRCODE = '23K03';
    END IF;
    IF own_xmin IS NOT NULL AND random() < 0.05 THEN PERFORM kkt_fold_changes(own_xmin); END IF;
    RETURN NULL;
END $$""",
    """\
CREATE FUNCTION kkt_receipts_changed() RETURNS trigger LANGUAGE plpgsql SET jit = off SET enable_nestloop = off AS $$
DECLARE
    own_xmin text;
BEGIN
    -- enable_nestloop and MATERIALIZED: else the plan, made for an update of one row, compares each new row with each
    -- old one.
    WITH pairs AS MATERIALIZED (
        SELECT id, later.status, later.retry_count, later.last_error, later.held_at, later.digest, later.changed_at,
            later.synced_at, later.hlc_server_time, later.hlc_local_time, later.hlc_logical_counter,
            earlier.status AS old_status, earlier.retry_count AS old_retry_count, earlier.held_at AS old_held_at
        FROM new_rows AS later JOIN old_rows AS earlier USING (id)
    ), told AS (
        INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
        SELECT fact, id, at, metadata
        FROM pairs CROSS JOIN LATERAL (VALUES
            ('receipt_attempt_failed', retry_count > old_retry_count, changed_at,
                json_build_object('retry_count', retry_count, 'error', last_error)),
            ('receipt_completed', old_held_at IS NOT NULL AND held_at IS NULL AND status <> 'synced', changed_at,
                CASE WHEN digest IS NOT NULL THEN json_build_object('digest', digest) END),
            ('receipt_synced', status = 'synced' AND old_status <> 'synced', synced_at,
                json_build_object('server_time', hlc_server_time, 'retry_count', retry_count))
        ) AS facts (fact, is_new, given, metadata), COALESCE(given, floor(extract(epoch FROM now()))::bigint) AS at
        WHERE is_new ORDER BY hlc_local_time, hlc_logical_counter
    )
    INSERT INTO buffer_changes (pending, syncing, synced, failed, last_synced_at)
    SELECT
        COUNT(*) FILTER (WHERE status = 'pending') - COUNT(*) FILTER (WHERE old_status = 'pending'),
        COUNT(*) FILTER (WHERE status = 'syncing') - COUNT(*) FILTER (WHERE old_status = 'syncing'),
        COUNT(*) FILTER (WHERE status = 'synced') - COUNT(*) FILTER (WHERE old_status = 'synced'),
        COUNT(*) FILTER (WHERE status = 'failed') - COUNT(*) FILTER (WHERE old_status = 'failed'),
        MAX(synced_at)
    FROM pairs WHERE status <> old_status HAVING COUNT(*) > 0 RETURNING xmin INTO own_xmin;
    IF own_xmin IS NOT NULL AND random() < 0.05 THEN PERFORM kkt_fold_changes(own_xmin); END IF;
    RETURN NULL;
END $$""",
    """\
CREATE FUNCTION kkt_receipts_removed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO buffer_changes (pending, syncing, synced, failed)
    SELECT -COUNT(*) FILTER (WHERE status = 'pending'), -COUNT(*) FILTER (WHERE status = 'syncing'), -COUNT(*)
        FILTER (WHERE status = 'synced'), -COUNT(*) FILTER (WHERE status = 'failed')
    FROM old_rows HAVING COUNT(*) > 0;
    RETURN NULL;
END $$""",
    """\
CREATE FUNCTION kkt_dead_letters_added() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    SELECT 'receipt_failed', original_receipt_id, failed_at,
        json_build_object('reason', reason, 'retry_attempts', retry_attempts)
    FROM new_rows;
    INSERT INTO buffer_changes (open_dead_letters)
    SELECT COUNT(*) FROM new_rows WHERE resolved_at IS NULL HAVING COUNT(*) > 0;
    RETURN NULL;
END $$""",
    """\
CREATE FUNCTION kkt_dead_letters_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO buffer_events (event_type, receipt_id, timestamp, metadata)
    SELECT 'receipt_' || COALESCE(later.resolution, 'resolved'), later.original_receipt_id, later.resolved_at,
        json_build_object('actor', later.resolved_by, 'reason', later.resolution_reason)
    FROM new_rows AS later JOIN old_rows AS earlier USING (id) WHERE earlier.resolved_at IS NULL
        AND later.resolved_at IS NOT NULL
        AND COALESCE(later.resolution, 'resolved') IN ('requeued', 'resolved');
    INSERT INTO buffer_changes (open_dead_letters)
    SELECT COUNT(*) FILTER (WHERE later.resolved_at IS NULL) - COUNT(*) FILTER (WHERE earlier.resolved_at IS NULL)
    FROM new_rows AS later JOIN old_rows AS earlier USING (id)
        WHERE (later.resolved_at IS NULL) <> (earlier.resolved_at IS NULL) HAVING COUNT(*) > 0;
    RETURN NULL;
END $$""",
    """\
CREATE FUNCTION kkt_dead_letters_removed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO buffer_changes (open_dead_letters)
    SELECT -COUNT(*) FROM old_rows WHERE resolved_at IS NULL HAVING COUNT(*) > 0;
    RETURN NULL;
END $$""",
    # Guards. A stale snapshot would not see the receipts of the transaction that had the lock before.
    """\
CREATE FUNCTION kkt_guard_insert() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'the isolation level is not read committed' USING ERRCODE = '55K01';
    END IF;
    PERFORM kkt_lock_buffer();
    RETURN NULL;
END $$""",
    """\
CREATE FUNCTION kkt_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '%', TG_ARGV[0] USING ERRCODE = COALESCE(TG_ARGV[1], '23K02');
END $$""",
    """\
CREATE FUNCTION kkt_guard_dead_letter() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT 1 FROM receipts WHERE id = NEW.original_receipt_id AND status IN ('synced', 'failed')) THEN
        RAISE EXCEPTION 'a synced or failed receipt cannot be dead-lettered' USING ERRCODE = '23K02';
    END IF;
    RETURN NEW;
END $$""",
    """\
CREATE FUNCTION kkt_guard_failed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (NEW.status = 'failed') <> EXISTS (
        SELECT 1 FROM dlq WHERE original_receipt_id = NEW.id AND resolved_at IS NULL) THEN
        RAISE EXCEPTION '%', CASE WHEN NEW.status = 'failed'
        THEN 'a receipt fails through its dead letter: insert that'
            ELSE 'a failed receipt has an open dead letter: resolve that' END || ' first' USING ERRCODE = '23K02';
    END IF;
    RETURN NEW;
END $$""",
    """\
CREATE FUNCTION kkt_guard_event_removed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.timestamp > extract(epoch FROM clock_timestamp()) - 86400 * COALESCE((SELECT CASE WHEN value ~ '^\\d{1,10}$'
        THEN value::bigint ELSE 0 END FROM config WHERE key = 'retention_events_days'), 90) THEN
        RAISE EXCEPTION 'an event cannot be deleted before retention_events_days have passed'
            USING ERRCODE = '23K02';
    END IF;
    RETURN OLD;
END $$""",
)

VIEWS = (
    "CREATE VIEW buffer_state AS SELECT * FROM kkt_state()",
    """\
CREATE VIEW v_buffer_status AS SELECT
    pending + syncing + synced + failed AS total_receipts,
    pending, syncing, synced, failed, open_dead_letters AS dlq_size, capacity,
    ROUND(100.0 * (pending + syncing) / GREATEST(capacity, 1), 2) AS percent_full
FROM buffer_state, kkt_buffer_capacity() AS capacity""",
)

TRIGGERS = (
    """\
CREATE TRIGGER trg_receipts_added AFTER INSERT ON receipts
REFERENCING NEW TABLE AS new_rows
FOR EACH STATEMENT EXECUTE FUNCTION kkt_receipts_added()""",
    """\
CREATE TRIGGER trg_receipts_changed AFTER UPDATE ON receipts
REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
FOR EACH STATEMENT EXECUTE FUNCTION kkt_receipts_changed()""",
    """\
CREATE TRIGGER trg_receipts_removed AFTER DELETE ON receipts
REFERENCING OLD TABLE AS old_rows
FOR EACH STATEMENT EXECUTE FUNCTION kkt_receipts_removed()""",
    """\
CREATE TRIGGER trg_dead_letters_added AFTER INSERT ON dlq
REFERENCING NEW TABLE AS new_rows
FOR EACH STATEMENT EXECUTE FUNCTION kkt_dead_letters_added()""",
    """\
CREATE TRIGGER trg_dead_letters_changed AFTER UPDATE ON dlq
REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
FOR EACH STATEMENT EXECUTE FUNCTION kkt_dead_letters_changed()""",
    """\
CREATE TRIGGER trg_dead_letters_removed AFTER DELETE ON dlq
REFERENCING OLD TABLE AS old_rows
FOR EACH STATEMENT EXECUTE FUNCTION kkt_dead_letters_removed()""",
    """\
CREATE TRIGGER trg_guard_insert BEFORE INSERT ON receipts
FOR EACH STATEMENT WHEN (COALESCE(current_setting('kkt_buffer.is_checked', true), '') <> 'yes')
EXECUTE FUNCTION kkt_guard_insert()""",
    """\
CREATE TRIGGER trg_guard_acknowledged BEFORE UPDATE ON receipts
FOR EACH ROW WHEN ((NEW.id, NEW.pos_id, NEW.created_at, NEW.hlc_local_time, NEW.hlc_logical_counter) IS DISTINCT
FROM (OLD.id, OLD.pos_id, OLD.created_at, OLD.hlc_local_time, OLD.hlc_logical_counter) OR (OLD.held_at IS NULL AND
(NEW.fiscal_doc, NEW.digest, NEW.inserted_digest) IS DISTINCT FROM (OLD.fiscal_doc, OLD.digest,
OLD.inserted_digest)))
EXECUTE FUNCTION kkt_guard('an acknowledged receipt does not change', '23K01')""",
    """\
CREATE TRIGGER trg_guard_held BEFORE UPDATE ON receipts
FOR EACH ROW WHEN (NEW.held_at IS NOT NULL AND NEW.held_at IS DISTINCT FROM OLD.held_at)
EXECUTE FUNCTION kkt_guard('held_at is set when a receipt is stored, never later', '23K02')""",
    """\
CREATE TRIGGER trg_guard_undelivered BEFORE DELETE ON receipts
FOR EACH ROW WHEN (OLD.status IN ('pending', 'syncing'))
EXECUTE FUNCTION kkt_guard('an undelivered receipt cannot be deleted', '23K02')""",
    """\
CREATE TRIGGER trg_guard_dead_letter BEFORE INSERT ON dlq
FOR EACH ROW WHEN (NEW.resolved_at IS NULL) EXECUTE FUNCTION kkt_guard_dead_letter()""",
    """\
CREATE TRIGGER trg_guard_failed BEFORE UPDATE ON receipts
FOR EACH ROW WHEN ((NEW.status = 'failed') <> (OLD.status = 'failed')) EXECUTE FUNCTION kkt_guard_failed()""",
    """\
CREATE TRIGGER trg_guard_event_changed BEFORE UPDATE ON buffer_events
FOR EACH ROW WHEN (true) EXECUTE FUNCTION kkt_guard('buffer_events is append-only', '23K02')""",
    """\
CREATE TRIGGER trg_guard_event_removed BEFORE DELETE ON buffer_events
FOR EACH ROW EXECUTE FUNCTION kkt_guard_event_removed()""",
    """\
CREATE TRIGGER trg_guard_truncate_receipts BEFORE TRUNCATE ON receipts
FOR EACH STATEMENT EXECUTE FUNCTION kkt_guard('a buffer is pruned, not truncated')""",
    """\
CREATE TRIGGER trg_guard_truncate_dlq BEFORE TRUNCATE ON dlq
FOR EACH STATEMENT EXECUTE FUNCTION kkt_guard('a buffer is pruned, not truncated')""",
    """\
CREATE TRIGGER trg_guard_truncate_buffer_events BEFORE TRUNCATE ON buffer_events
FOR EACH STATEMENT EXECUTE FUNCTION kkt_guard('a buffer is pruned, not truncated')""",
    """\
CREATE TRIGGER trg_guard_truncate_buffer_changes BEFORE TRUNCATE ON buffer_changes
FOR EACH STATEMENT EXECUTE FUNCTION kkt_guard('a buffer is pruned, not truncated')""",
)


def server_statements(schema: str) -> list[str]:
    """
    What makes all of it in a schema. `kkt_buffer.check` runs the same statements, to know what it should find.

    Functions search that schema alone, whichever role calls them; pg_temp last, so that no temporary table hides one.
    """
    path = f"SET search_path = {schema}, pg_temp AS $$"
    return [
        *TABLES,
        "ALTER TABLE receipts SET (toast_tuple_target = 256)",  # documents are compressed: a third less WAL
        *(function.replace("AS $$", path, 1) for function in FUNCTIONS),
        *(re.sub(r"\b(kkt_\w+\()", rf"{schema}.\1", statement) for statement in (*VIEWS, *TRIGGERS)),
    ]


def upgrade() -> None:
    if op.get_context().dialect.name == "sqlite":
        return
    for statement in server_statements(op.get_bind().scalar(sa.text("SELECT quote_ident(current_schema())"))):
        run(statement)
    run("INSERT INTO buffer_changes (folded_below, hlc_local_time, hlc_logical_counter) VALUES ('0', 0, -1)")
    now = "floor(extract(epoch FROM clock_timestamp()))::bigint"
    for key, value in CONFIG.items():
        run(f"INSERT INTO config (key, value, updated_at) VALUES ('{key}', '{value}', {now})")


def downgrade() -> None:
    if op.get_context().dialect.name == "sqlite":
        return
    for table, what in (("receipts", "receipts"), ("dlq", "dead letters"), ("buffer_events", "events")):
        held = op.get_bind().scalar(sa.text(f"SELECT COUNT(*) FROM {table}"))
        if held:
            raise CommandError(
                f"refusing to drop the buffer: it holds {held} {what}. Nothing was changed. Deliver and prune them, or "
                "keep a backup and drop the schema yourself."
            )
    stored = op.get_bind().execute(sa.text("SELECT key, value FROM config WHERE key <> 'release' ORDER BY key"))
    own = [row.key for row in stored if CONFIG.get(row.key) != row.value]
    if own:
        raise CommandError(
            f"refusing to drop the buffer: it has changed settings ({', '.join(own)}). Nothing was changed. Keep a "
            "backup and drop the schema yourself."
        )
    for view in ("v_buffer_status", "buffer_state"):
        run(f"DROP VIEW {view}")
    for table in ("buffer_changes", "config", "buffer_events", "dlq", "receipts"):
        run(f"DROP TABLE {table}")
    for function in FUNCTIONS:
        run(f"DROP FUNCTION {function.split()[2].split('(')[0]}")


def run(statement: str) -> None:
    """Run a statement in which % and : mean nothing."""
    op.get_bind().exec_driver_sql(statement.replace("%", "%%"))

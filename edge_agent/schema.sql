-- The box's one database. Every hand-over between two steps is a row here; see edge_agent/database.py.
-- Timestamps are Unix seconds (REAL). Paths are relative to data_dir.

CREATE TABLE IF NOT EXISTS series (
  series_no          INTEGER PRIMARY KEY,          -- our own number: the only one that logs may show
  StudyInstanceUID   TEXT NOT NULL,
  SeriesInstanceUID  TEXT NOT NULL UNIQUE,
  Modality           TEXT NOT NULL,                -- as in the images: CR, DX, CT, MR, ...
  state              TEXT NOT NULL,                -- receiving | due | read | reported | failed | not-for-us
  version            INTEGER NOT NULL DEFAULT 0,   -- of the result; late instances raise it
  expected_count     INTEGER,                      -- where the images say how many belong to the series
  instance_count     INTEGER NOT NULL DEFAULT 0,
  first_instance_at  REAL NOT NULL,
  last_instance_at   REAL NOT NULL,
  association_ended  INTEGER NOT NULL DEFAULT 0,   -- 1 once the association that carried the last instance is over
  reason             TEXT NOT NULL DEFAULT ''      -- why failed or not for us
);
CREATE INDEX IF NOT EXISTS series_state ON series(state);

CREATE TABLE IF NOT EXISTS instances (
  SOPInstanceUID     TEXT PRIMARY KEY,
  series_no          INTEGER NOT NULL REFERENCES series(series_no),
  SOPClassUID        TEXT NOT NULL,
  TransferSyntaxUID  TEXT NOT NULL,
  path               TEXT NOT NULL,                -- DICOM file, data set bytes as received
  size               INTEGER NOT NULL,
  sha256             TEXT NOT NULL,
  received_at        REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS instances_series ON instances(series_no);

CREATE TABLE IF NOT EXISTS quarantine (
  quarantine_no      INTEGER PRIMARY KEY,
  path               TEXT NOT NULL,
  size               INTEGER NOT NULL,
  reason             TEXT NOT NULL,                -- without patient data
  calling_ae         TEXT NOT NULL,
  received_at        REAL NOT NULL,
  SOPInstanceUID     TEXT NOT NULL DEFAULT ''      -- of a copy that may yet take the place of an unreadable one
);

CREATE TABLE IF NOT EXISTS unreadable (            -- instances whose stored copy could not be decoded
  SOPInstanceUID     TEXT PRIMARY KEY REFERENCES instances(SOPInstanceUID)
);

CREATE TABLE IF NOT EXISTS removals (              -- series whose images were old enough to go; storage.keep_days
  series_no          INTEGER PRIMARY KEY REFERENCES series(series_no),
  removed_at         REAL NOT NULL,
  done               INTEGER NOT NULL DEFAULT 0    -- 1 once the files are gone
);
CREATE INDEX IF NOT EXISTS removals_open ON removals(series_no) WHERE done = 0;

CREATE TABLE IF NOT EXISTS results (
  result_no          INTEGER PRIMARY KEY,
  series_no          INTEGER NOT NULL REFERENCES series(series_no),
  version            INTEGER NOT NULL,
  bundle_digest      TEXT NOT NULL,
  release_version    INTEGER NOT NULL,
  provider           TEXT NOT NULL,
  findings           TEXT NOT NULL,                -- JSON of edge_agent.infer.Findings without arrays
  maps_path          TEXT NOT NULL,                -- npz: map_SHW, slice_weights_S, source_index_S
  abstained          INTEGER NOT NULL,
  last_instance_at   REAL NOT NULL,
  read_at            REAL NOT NULL,
  UNIQUE (series_no, version)
);
CREATE INDEX IF NOT EXISTS results_bundle ON results(bundle_digest, result_no);

CREATE TABLE IF NOT EXISTS outbox (                -- results on their way to the PACS
  item_no            INTEGER PRIMARY KEY,
  result_no          INTEGER NOT NULL REFERENCES results(result_no),
  kind               TEXT NOT NULL,                -- SR | SC
  SOPInstanceUID     TEXT NOT NULL UNIQUE,
  path               TEXT NOT NULL,
  state              TEXT NOT NULL DEFAULT 'pending',  -- pending | delivered | refused
  attempts           INTEGER NOT NULL DEFAULT 0,
  next_try_at        REAL NOT NULL,
  last_error         TEXT NOT NULL DEFAULT '',
  delivered_at       REAL
);
CREATE INDEX IF NOT EXISTS outbox_state ON outbox(state, next_try_at);

CREATE TABLE IF NOT EXISTS users (
  name               TEXT PRIMARY KEY,
  password           TEXT NOT NULL,                -- scrypt
  created_at         REAL NOT NULL
);

CREATE TABLE IF NOT EXISTS reviews (               -- every verdict is kept; the newest of a series counts
  review_no          INTEGER PRIMARY KEY,
  result_no          INTEGER NOT NULL REFERENCES results(result_no),
  series_no          INTEGER NOT NULL REFERENCES series(series_no),
  verdict            TEXT NOT NULL,                -- accepted | corrected
  label              TEXT NOT NULL,                -- label name of the task
  reviewer           TEXT NOT NULL,
  reviewed_at        REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS reviews_series ON reviews(series_no);

CREATE TABLE IF NOT EXISTS examples (              -- what a reviewed series teaches
  series_no          INTEGER PRIMARY KEY REFERENCES series(series_no),
  review_no          INTEGER NOT NULL REFERENCES reviews(review_no),
  modality           TEXT NOT NULL,                -- XR | CT | MR
  label              TEXT NOT NULL,
  split              TEXT NOT NULL,                -- train | heldout; by patient, never changes
  path               TEXT NOT NULL                 -- npz: slices_SHW float16
);

CREATE TABLE IF NOT EXISTS rounds (
  round_id           TEXT PRIMARY KEY,
  state              TEXT NOT NULL,                -- edge_agent.rounds.State
  plan               BLOB NOT NULL,                -- RoundPlan, MessagePack
  examples           INTEGER NOT NULL DEFAULT 0,
  update_path        TEXT NOT NULL DEFAULT '',     -- sealed update
  reason             TEXT NOT NULL DEFAULT '',
  changed_at         REAL NOT NULL
);

CREATE TABLE IF NOT EXISTS masked_parts (          -- of masked rounds that are on; goes with the round
  round_id           TEXT PRIMARY KEY REFERENCES rounds(round_id) ON DELETE CASCADE,
  part               BLOB NOT NULL                 -- edge_agent.masking.Part, with its secrets
);

CREATE TABLE IF NOT EXISTS spool (                 -- a trained update that no sum has: one at most; outlives its round
  only               INTEGER PRIMARY KEY CHECK (only = 1),
  round_id           TEXT NOT NULL,                -- that it was trained for
  base_digest        TEXT NOT NULL,                -- that it was trained from
  trainable          TEXT NOT NULL,
  examples           INTEGER NOT NULL,             -- its weight
  learned            TEXT NOT NULL,                -- JSON of edge_agent.learn.Example: what it was trained on
  path               TEXT NOT NULL,                -- safetensors: float32, neither clipped nor scaled
  sha256             TEXT NOT NULL,
  made_at            REAL NOT NULL,
  is_shown           INTEGER NOT NULL DEFAULT 0    -- 1 once it was sealed for an open round: the hub may have read it
);

CREATE TABLE IF NOT EXISTS stale_updates (         -- of buffered rounds: what the sealed update was trained from
  round_id           TEXT PRIMARY KEY REFERENCES rounds(round_id) ON DELETE CASCADE,
  base_digest        TEXT NOT NULL,
  staleness          INTEGER NOT NULL,             -- releases between that base and the round's
  sha256             TEXT NOT NULL                 -- as in `spool`
);

CREATE TABLE IF NOT EXISTS privacy_costs (         -- of rounds with noise; outlives its round: what was spent is never forgotten
  cost_no            INTEGER PRIMARY KEY,
  round_id           TEXT NOT NULL,
  l2_squared         INTEGER NOT NULL,             -- models.accountant.Cost
  l1                 INTEGER NOT NULL,
  variance           INTEGER NOT NULL,
  is_spent           INTEGER NOT NULL DEFAULT 0    -- 0: pledged since the round was joined; goes with the round
);

CREATE TABLE IF NOT EXISTS bundles (
  bundle_digest      TEXT PRIMARY KEY,
  release_version    INTEGER NOT NULL,
  path               TEXT NOT NULL,
  state              TEXT NOT NULL,                -- offered | fetched | active | previous | refused
  reason             TEXT NOT NULL DEFAULT '',     -- why refused; or that it came from the hub before
  changed_at         REAL NOT NULL
);

CREATE TABLE IF NOT EXISTS link_outbox (           -- durable messages to the hub, kept until its Receipt
  message_id         TEXT PRIMARY KEY,
  body               BLOB NOT NULL,
  created_at         REAL NOT NULL
);

CREATE TABLE IF NOT EXISTS transfers_out (         -- large things to the hub, kept until its TransferReceipt
  transfer_id        TEXT PRIMARY KEY,
  kind               TEXT NOT NULL,
  subject            TEXT NOT NULL,
  path               TEXT NOT NULL,
  sha256             TEXT NOT NULL,
  size               INTEGER NOT NULL,
  created_at         REAL NOT NULL
);

CREATE TABLE IF NOT EXISTS alarms (                -- what somebody must look at, until it is over
  name               TEXT PRIMARY KEY,
  text               TEXT NOT NULL,
  raised_at          REAL NOT NULL,
  is_notice          INTEGER NOT NULL DEFAULT 0    -- to be known; the box is fit for a new release all the same
);

CREATE TABLE IF NOT EXISTS counters (              -- bytes_sent, bytes_received, highest hub sequence, ...
  name               TEXT PRIMARY KEY,
  value              INTEGER NOT NULL
);

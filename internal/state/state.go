// Package state keeps the workspace records in one SQLite file.
//
// It stores and finds; it decides nothing. Which moves between states are
// legal, and what a record found after a crash means, is package workspace's
// business: it writes the intent into the record's State before each effect,
// so the record is the journal and there is no second one that could disagree.
//
// # Schema
//
// Version 1 (migrations/0001_workspaces.sql), `PRAGMA user_version`:
//
//	workspaces  one row a workspace
//	  id      primary key; checked against the record
//	  record  the whole record as JSON
//	  name    generated from record, as are those below; unique
//	  state   indexed
//	  image   the image's digest
//	  uid     the machine's Unix user; unique where it is not 0
//	  cid     vsock context id; unique where it is not 0
//
// The record is JSON because the daemon always reads and writes it whole, and
// what is queried or unique is a column that SQLite itself derives from the
// JSON, so that the two cannot disagree. The JSON's keys are the field names
// of [domain.Workspace]; a golden test holds them, and a key that this version
// does not know is an error, because dropping it would lose it. Renaming a
// field therefore takes a migration.
//
// Migrations are numbered SQL files, each applied with its version number in
// one transaction. A file of a newer version is refused and left as it is.
//
// # Durability
//
// The journal mode is WAL with synchronous=FULL: every commit is fsynced
// before the call returns, so an acknowledged write survives the loss of power
// as far as the disk keeps its word. A call that returned an error has changed
// nothing, except that a commit whose fsync failed may turn up after a restart.
// Open checks the file's integrity and then puts a copy of a good file beside it
// (PATH.bak), for the day when it is not.
//
// # Concurrency
//
// All methods may be called concurrently, also by several processes: each
// write is one immediate transaction, over the single writing connection of
// this process, and waits up to five seconds for another process's.
package state

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	// The driver named "sqlite".
	_ "modernc.org/sqlite"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

// busyTimeoutMillis is how long a write waits for another process's.
const busyTimeoutMillis = 5000

// readers bounds the connections that only read.
const readers = 4

// Options say where the records are.
type Options struct {
	// Path of the database file; its directory must exist. The file and its
	// companions (-wal, -shm, .bak) are made with mode 0600, because records
	// hold the environments of workspaces.
	Path string
	Log  *slog.Logger // nil: none
}

// DB is an open state file.
type DB struct {
	opt     Options
	w, r    *sql.DB
	created bool
}

// Open opens the state file, creating or migrating it as needed. Faults: the
// file is corrupt, of a newer version, of another program, or the disk is full.
func Open(ctx context.Context, opt Options) (_ *DB, err error) {
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	if !filepath.IsAbs(opt.Path) {
		return nil, fmt.Errorf("open state %s: path is not absolute", opt.Path)
	}
	if err := touch(opt.Path); err != nil {
		return nil, openFault(opt.Path, err)
	}
	db := &DB{opt: opt}
	defer func() {
		if err != nil {
			_ = db.Close()
		}
	}()
	// Immediate transactions take the write lock at BEGIN, where SQLite can
	// wait for it; a read lock that is upgraded later cannot wait and fails.
	db.w, err = sql.Open("sqlite", dsn(opt.Path, "_txlock=immediate"))
	if err != nil {
		return nil, fmt.Errorf("open state %s: %w", opt.Path, err)
	}
	db.w.SetMaxOpenConns(1)
	db.r, err = sql.Open("sqlite", dsn(opt.Path, "_query_only=1"))
	if err != nil {
		return nil, fmt.Errorf("open state %s: %w", opt.Path, err)
	}
	db.r.SetMaxOpenConns(readers)
	if err := db.check(ctx); err != nil {
		return nil, err
	}
	if err := db.migrate(ctx); err != nil {
		return nil, err
	}
	if !db.created {
		db.backup(ctx)
	}
	return db, nil
}

// Created reports whether Open found no records file and made an empty one.
// What lies on the host's disks then may belong to records that were lost, so
// a sweep of things without a record should not follow from it unasked.
func (db *DB) Created() bool { return db.created }

// Close waits for the calls in progress and closes the file.
func (db *DB) Close() error {
	var errs []error
	for _, d := range []*sql.DB{db.r, db.w} { // the last to close folds the WAL in
		if d != nil {
			errs = append(errs, d.Close())
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close state: %w", err)
	}
	return nil
}

// dsn names the file for the driver with the settings of every connection.
func dsn(path, extra string) string {
	// journal_size_limit: a WAL that a long reader let grow is cut back.
	return fmt.Sprintf("file://%s?_busy_timeout=%d&_synchronous=FULL&_pragma=journal_size_limit(4194304)&_pragma=trusted_schema(0)&%s",
		(&url.URL{Path: path}).EscapedPath(), busyTimeoutMillis, extra)
}

// touch makes the file if it is absent and its mode 0600 in any case; SQLite
// gives its companions the same mode.
func touch(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Chmod(0o600)
}

// Insert adds a record if its id and name are free and fewer than limit
// records exist, all in one transaction: of two racing inserts one sees the
// other. It returns [domain.ErrIDTaken] or a fault of kind name_taken, limit
// or no_space. A Unix user or CID that another record has is an error, too.
func (db *DB) Insert(ctx context.Context, w *domain.Workspace, limit int) error {
	if w.ID == "" || w.Name == "" {
		return fmt.Errorf("insert workspace %q: id or name is empty", w.ID)
	}
	rec, err := json.Marshal(w)
	if err != nil {
		return fmt.Errorf("insert workspace %s: %w", w.ID, err)
	}
	err = db.write(ctx, func(tx *sql.Tx) error {
		var count, sameID, sameName int
		err := tx.QueryRowContext(ctx, `SELECT count(*), count(*) FILTER (WHERE id = ?), count(*) FILTER (WHERE name = ?) FROM workspaces`,
			w.ID, w.Name).Scan(&count, &sameID, &sameName)
		switch {
		case err != nil:
			return err
		case sameID > 0:
			return domain.ErrIDTaken
		case sameName > 0:
			return nameTaken(w.Name)
		case count >= limit:
			return fault.New(fault.Limit, "%d workspaces exist, and the limit is %d", count, limit).
				WithNext("Destroy one (`agentiso ls` shows them), or raise resources.max_workspaces in the configuration.")
		}
		_, err = tx.ExecContext(ctx, `INSERT INTO workspaces (id, record) VALUES (?, ?)`, w.ID, string(rec))
		return err
	})
	return db.wrap(ctx, "insert workspace "+w.ID, err)
}

// Update replaces the record with w's id. It returns a fault of kind not_found,
// name_taken or no_space.
func (db *DB) Update(ctx context.Context, w *domain.Workspace) error {
	rec, err := json.Marshal(w)
	if err != nil {
		return fmt.Errorf("update workspace %s: %w", w.ID, err)
	}
	err = db.write(ctx, func(tx *sql.Tx) error {
		var same int
		err := tx.QueryRowContext(ctx, `SELECT count(*) FROM workspaces WHERE name = ? AND id <> ?`, w.Name, w.ID).Scan(&same)
		switch {
		case err != nil:
			return err
		case same > 0:
			return nameTaken(w.Name)
		}
		res, err := tx.ExecContext(ctx, `UPDATE workspaces SET record = ? WHERE id = ?`, string(rec), w.ID)
		if err != nil {
			return err
		}
		if n, err := res.RowsAffected(); err != nil || n == 1 {
			return err
		}
		return notFound(w.ID)
	})
	return db.wrap(ctx, "update workspace "+w.ID, err)
}

// Delete removes the record; absent is not an error.
func (db *DB) Delete(ctx context.Context, id string) error {
	err := db.write(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `DELETE FROM workspaces WHERE id = ?`, id)
		return err
	})
	return db.wrap(ctx, "delete workspace "+id, err)
}

// List returns all records, oldest first. The caller owns them.
func (db *DB) List(ctx context.Context) (_ []*domain.Workspace, err error) {
	defer func() { err = db.wrap(ctx, "list workspaces", err) }()
	rows, err := db.r.QueryContext(ctx, `SELECT id, record FROM workspaces`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []*domain.Workspace
	for rows.Next() {
		var id, rec string
		if err := rows.Scan(&id, &rec); err != nil {
			return nil, err
		}
		w, err := decode(rec)
		if err != nil {
			return nil, fault.New(fault.Internal, "the record of workspace %s in %s cannot be read: %w", id, db.opt.Path, err).
				WithNext("Run the version of agentiso that wrote it, or restore %s.bak.", db.opt.Path)
		}
		all = append(all, w)
	}
	slices.SortFunc(all, func(a, b *domain.Workspace) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), strings.Compare(a.ID, b.ID))
	})
	return all, rows.Err()
}

// write runs fn in one transaction of the writing connection.
func (db *DB) write(ctx context.Context, fn func(*sql.Tx) error) error {
	tx, err := db.w.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }()
	if err := fn(tx); err != nil {
		return err
	}
	return tx.Commit()
}

func decode(rec string) (*domain.Workspace, error) {
	d := json.NewDecoder(strings.NewReader(rec))
	d.DisallowUnknownFields()
	w := new(domain.Workspace)
	if err := d.Decode(w); err != nil {
		return nil, err
	}
	return w, nil
}

func nameTaken(name string) error {
	return fault.New(fault.NameTaken, "a workspace named %q exists already", name).
		WithNext("Choose another name, or destroy that workspace first.")
}

func notFound(id string) error {
	return fault.New(fault.NotFound, "no workspace has the id %s", id).
		WithNext("List the workspaces with `agentiso ls`.")
}

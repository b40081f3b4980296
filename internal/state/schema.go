package state

import (
	"context"
	"database/sql"
	"embed"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/agentiso/agentiso/internal/fault"
)

//go:embed migrations/*.sql
var migrations embed.FS

// applicationID marks the file as ours ("agis"), so that a database of another
// program given by mistake is refused and not migrated.
const applicationID = 0x61676973

// steps returns the migrations in order; the file names begin with the version
// that each leads to.
func steps() ([]string, error) {
	names, err := fs.Glob(migrations, "migrations/*.sql")
	if err != nil {
		return nil, err
	}
	all := make([]string, len(names))
	for i, name := range names { // Glob sorts
		if want := fmt.Sprintf("migrations/%04d_", i+1); len(name) < len(want) || name[:len(want)] != want {
			return nil, fmt.Errorf("migration %s: want a name that begins with %s", name, want)
		}
		b, err := migrations.ReadFile(name)
		if err != nil {
			return nil, err
		}
		all[i] = string(b)
	}
	return all, nil
}

// check refuses a file that is damaged, before anything is written to it.
func (db *DB) check(ctx context.Context) error {
	var verdict string
	if err := db.w.QueryRowContext(ctx, `PRAGMA integrity_check(1)`).Scan(&verdict); err != nil {
		return db.wrap(ctx, "check state "+db.opt.Path, err)
	}
	if verdict != "ok" {
		return db.corrupt(fmt.Errorf("integrity check: %s", verdict))
	}
	return nil
}

// migrate brings the file to the newest version that this build knows.
func (db *DB) migrate(ctx context.Context) error {
	todo, err := steps()
	if err != nil {
		return err
	}
	if err := db.identify(ctx, db.w, len(todo)); err != nil {
		return err
	}
	// Persistent, so that every other connection has it as well.
	var mode string
	if err := db.w.QueryRowContext(ctx, `PRAGMA journal_mode = WAL`).Scan(&mode); err != nil {
		return db.wrap(ctx, "prepare state "+db.opt.Path, err)
	}
	if mode != "wal" {
		return fault.New(fault.Unsupported, "the file system of %s cannot hold a write-ahead log (SQLite chose journal mode %q)", db.opt.Path, mode).
			WithNext("Put data_dir on a local file system.")
	}
	for {
		done := false
		err := db.write(ctx, func(tx *sql.Tx) error {
			// Again, now that no other process can be migrating.
			if err := db.identify(ctx, tx, len(todo)); err != nil {
				return err
			}
			var version int
			if err := tx.QueryRowContext(ctx, `PRAGMA user_version`).Scan(&version); err != nil {
				return err
			}
			if done = version == len(todo); done {
				return nil
			}
			db.created = db.created || version == 0
			if _, err := tx.ExecContext(ctx, todo[version]); err != nil {
				return fmt.Errorf("version %d: %w", version+1, err)
			}
			_, err := tx.ExecContext(ctx, fmt.Sprintf(`PRAGMA application_id = %d; PRAGMA user_version = %d`, applicationID, version+1))
			return err
		})
		if err != nil {
			return db.wrap(ctx, "migrate state "+db.opt.Path, err)
		}
		if done {
			return nil
		}
	}
}

// querier is what a connection and a transaction have in common.
type querier interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// identify refuses a file that is not ours or newer than this build.
func (db *DB) identify(ctx context.Context, q querier, newest int) error {
	var app, version, tables int
	err := q.QueryRowContext(ctx, `SELECT (SELECT application_id FROM pragma_application_id),
		(SELECT user_version FROM pragma_user_version), (SELECT count(*) FROM sqlite_schema)`).Scan(&app, &version, &tables)
	switch {
	case err != nil:
		return db.wrap(ctx, "read version of state "+db.opt.Path, err)
	case app == 0 && version == 0 && tables == 0:
		return nil
	case app != applicationID:
		return fault.New(fault.Invalid, "%s is a database of another program", db.opt.Path).
			WithNext("Point data_dir at a directory of agentiso's own.")
	case version > newest:
		return fault.New(fault.Unsupported, "%s has schema version %d and this agentiso knows versions up to %d: a newer agentiso wrote it", db.opt.Path, version, newest).
			WithNext("Install that newer version again; the file was not changed.")
	}
	return nil
}

// backup puts a copy of the checked file beside it. It is a precaution, so its
// failure is no reason not to start.
func (db *DB) backup(ctx context.Context) {
	start := time.Now()
	bak := db.opt.Path + ".bak"
	tmp := bak + ".tmp"
	err := func() error {
		if err := os.Remove(tmp); err != nil && !os.IsNotExist(err) {
			return err
		}
		if err := touch(tmp); err != nil {
			return err
		}
		if _, err := db.w.ExecContext(ctx, `VACUUM INTO ?`, tmp); err != nil {
			return err
		}
		if err := syncPath(tmp); err != nil {
			return err
		}
		if err := os.Rename(tmp, bak); err != nil {
			return err
		}
		return syncPath(filepath.Dir(bak))
	}()
	if err != nil {
		_ = os.Remove(tmp)
		db.opt.Log.Warn("back up state", "path", bak, "err", err)
		return
	}
	db.opt.Log.Debug("backed up state", "path", bak, "dur", time.Since(start))
}

func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

package state

import (
	"bytes"
	"database/sql"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/agentiso/agentiso/internal/fault"
)

func TestOpenRefuses(t *testing.T) {
	exec := func(t *testing.T, path, query string) {
		t.Helper()
		d, err := sql.Open("sqlite", "file://"+path)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		if _, err := d.ExecContext(t.Context(), query); err != nil {
			t.Fatal(err)
		}
	}
	good := func(t *testing.T, path string) {
		t.Helper()
		db, err := Open(t.Context(), Options{Path: path})
		if err != nil {
			t.Fatal(err)
		}
		for _, id := range []string{"a", "b", "c"} {
			w := ws(id, id)
			w.Reason = strings.Repeat("x", 5000)
			if err := db.Insert(t.Context(), w, 9); err != nil {
				t.Fatal(err)
			}
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
	}
	tests := []struct {
		name string
		make func(t *testing.T, path string)
		kind fault.Kind
		says string
	}{
		{"newer version", func(t *testing.T, path string) {
			good(t, path)
			exec(t, path, `PRAGMA user_version = 99`)
		}, fault.Unsupported, "schema version 99"},
		{"another program's", func(t *testing.T, path string) {
			exec(t, path, `CREATE TABLE bookmarks (url)`)
		}, fault.Invalid, "another program"},
		{"no database", func(t *testing.T, path string) {
			if err := os.WriteFile(path, bytes.Repeat([]byte("agentiso "), 1000), 0o600); err != nil {
				t.Fatal(err)
			}
		}, fault.Internal, "damaged"},
		{"torn pages", func(t *testing.T, path string) {
			good(t, path)
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			for i := 4096; i < len(b); i += 512 {
				copy(b[i:], "rubbish!")
			}
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}, fault.Internal, "damaged"},
		{"cut off", func(t *testing.T, path string) {
			good(t, path)
			if err := os.Truncate(path, 8192); err != nil {
				t.Fatal(err)
			}
		}, fault.Internal, "damaged"},
		{"a directory", func(t *testing.T, path string) {
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
		}, fault.Missing, "cannot open"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "state.db")
			tt.make(t, path)
			before, _ := os.ReadFile(path)
			db, err := Open(t.Context(), Options{Path: path})
			if err == nil {
				_ = db.Close()
				t.Fatal("Open succeeded")
			}
			if f := fault.As(err); f.Kind != tt.kind || !strings.Contains(f.Msg, tt.says) || f.Next == "" {
				t.Errorf("Open: %s: %s (next: %s); want %s with %q", f.Kind, f.Msg, f.Next, tt.kind, tt.says)
			}
			if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
				t.Error("a refused file was changed")
			}
		})
	}
}

// TestBackupRestores follows the advice that a damaged file's error gives.
func TestBackupRestores(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	db := open(t, path)
	if err := db.Insert(t.Context(), ws("a", "alpha"), 1); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if err := open(t, path).Close(); err != nil { // makes the copy
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Open(t.Context(), Options{Path: path})
	if err == nil || !strings.Contains(fault.As(err).Next, path+".bak") {
		t.Fatalf("Open of a damaged file: %v, next %q", err, fault.As(err).Next)
	}
	if err := os.Rename(path+".bak", path); err != nil {
		t.Fatal(err)
	}
	if all, err := open(t, path).List(t.Context()); err != nil || len(all) != 1 || all[0].Name != "alpha" {
		t.Errorf("after the copy was put in its place: %v, %v", all, err)
	}
}

func TestMissingDirectory(t *testing.T) {
	_, err := Open(t.Context(), Options{Path: filepath.Join(t.TempDir(), "no", "state.db")})
	if !fault.Is(err, fault.Missing) {
		t.Errorf("Open: %v", err)
	}
}

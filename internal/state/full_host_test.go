//go:build host

package state

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

// TestFullDisk fills the file system under an open state file and then frees it.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=2m"); err != nil {
		t.Skipf("missing capability: mount (%v)", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	path := filepath.Join(dir, "state.db")
	db := open(t, path)
	keep := ws("keep", "keep")
	if err := db.Insert(t.Context(), keep, 100); err != nil {
		t.Fatal(err)
	}
	ballast := filepath.Join(dir, "ballast")
	f, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = f.Write(bytes.Repeat([]byte{1}, 4096))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}

	err = nil
	n := 0
	for ; err == nil && n < 100; n++ { // what the log file still has allocated is used first
		w := ws(fmt.Sprint(n), fmt.Sprint(n))
		w.Reason = strings.Repeat("x", 10_000)
		err = db.Insert(t.Context(), w, 1000)
	}
	if !fault.Is(err, fault.NoSpace) {
		t.Fatalf("Insert on a full disk: %v", err)
	}
	t.Log(fault.As(err).Msg)
	if _, err := Open(t.Context(), Options{Path: filepath.Join(dir, "second.db")}); !fault.Is(err, fault.NoSpace) {
		t.Errorf("Open of a new file on a full disk: %v", err)
	}
	all, err := db.List(t.Context())
	if err != nil || len(all) != n { // keep and the n-1 that were acknowledged
		t.Fatalf("List on a full disk: %d records, %v; want %d", len(all), err, n)
	}

	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	keep.State = domain.Running
	if err := db.Update(t.Context(), keep); err != nil {
		t.Errorf("Update after space was freed: %v", err)
	}
	if err := db.Close(); err != nil {
		t.Error(err)
	}
	if all, err := open(t, path).List(t.Context()); err != nil || len(all) != n {
		t.Errorf("after reopening: %d records, %v; want %d", len(all), err, n)
	}
}

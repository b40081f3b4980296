package state

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

var update = flag.Bool("update", false, "rewrite golden files")

func open(t *testing.T, path string) *DB {
	t.Helper()
	db, err := Open(t.Context(), Options{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return db
}

func ws(id, name string) *domain.Workspace {
	return &domain.Workspace{ID: id, Name: name, State: domain.Creating, CreatedAt: time.Unix(1e9, 0).UTC()}
}

// full has every field set, so that one which is lost on the way is seen.
func fullRecord() *domain.Workspace {
	at := time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC)
	return &domain.Workspace{
		ID: "w0000001", Name: "alpha", State: domain.Running, Reason: "because", CreatedAt: at, StartedAt: at.Add(time.Second),
		Image: "dev", ImageDigest: "sha256:aa", Kernel: "lean", Init: "fast", CPUs: 2, MemoryMiB: 512, DiskBytes: 10 << 30,
		Env: map[string]string{"A": "1"}, User: "user", Workdir: "/w", Policy: domain.NetworkPolicy{AllowInternet: true},
		Hostname: "alpha", MachineID: strings.Repeat("0", 32),
		Slot: domain.NetworkSlot{
			Driver: "user", MAC: "02:00:00:00:00:01", Address: netip.MustParsePrefix("10.0.2.15/24"),
			Gateway: netip.MustParseAddr("10.0.2.2"), DNS: []netip.Addr{netip.MustParseAddr("10.0.2.3")}, TAP: "tap0", Restrict: true,
		},
		Disk: domain.Disk{Path: "/d/disk.qcow2", Format: domain.QCOW2, SizeBytes: 10 << 30},
		UID:  1900000001, CID: 100, Ephemeral: true,
		Machine: domain.Process{
			PID: 7, StartTicks: 8, BootID: "b", RunDir: "/r", Accel: "tcg",
			Endpoint: domain.Endpoint{Kind: domain.LinkSerial, Socket: "/s", CID: 100, Key: []byte{1}},
		},
	}
}

var cmpNet = cmp.Options{cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{})}

func TestRecordRoundTrip(t *testing.T) {
	want := fullRecord()
	assertFilled(t, reflect.ValueOf(*want), "Workspace")
	path := filepath.Join(t.TempDir(), "a?b#c%20.db") // a path is not a URL
	db := open(t, path)
	if !db.Created() {
		t.Error("Created() = false for a new file")
	}
	if err := db.Insert(t.Context(), want, 1); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	db = open(t, path)
	if db.Created() {
		t.Error("Created() = true for an old file")
	}
	got, err := db.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]*domain.Workspace{want}, got, cmpNet); diff != "" {
		t.Errorf("record (-want +got):\n%s", diff)
	}
	for _, p := range []string{path, path + "-wal", path + ".bak"} {
		st, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode().Perm() != 0o600 {
			t.Errorf("mode of %s is %v, want 0600", p, st.Mode())
		}
	}
}

// assertFilled fails for any zero field: the round trip would not notice its loss.
func assertFilled(t *testing.T, v reflect.Value, path string) {
	t.Helper()
	if v.IsZero() {
		t.Errorf("%s is zero in the test's full record", path)
		return
	}
	if v.Kind() == reflect.Struct && v.Type().PkgPath() == reflect.TypeFor[domain.Workspace]().PkgPath() {
		for i := range v.NumField() {
			assertFilled(t, v.Field(i), path+"."+v.Type().Field(i).Name)
		}
	}
}

// TestRecordFormat holds the stored form: a renamed field fails here and needs
// a migration.
func TestRecordFormat(t *testing.T) {
	got, err := json.MarshalIndent(fullRecord(), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	golden := filepath.Join("testdata", "record.json")
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("stored form (-want +got):\n%s", diff)
	}
}

func TestUnknownFieldIsRefused(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "state.db"))
	if err := db.Insert(t.Context(), ws("a", "a"), 1); err != nil {
		t.Fatal(err)
	}
	if _, err := db.w.ExecContext(t.Context(), `UPDATE workspaces SET record = json_set(record, '$.Later', 1)`); err != nil {
		t.Fatal(err)
	}
	if _, err := db.List(t.Context()); err == nil || !strings.Contains(err.Error(), "Later") {
		t.Errorf("List: %v, want an error that names the field", err)
	}
}

func TestInsertRefuses(t *testing.T) {
	tests := []struct {
		name  string
		w     *domain.Workspace
		limit int
		want  func(error) bool
	}{
		{"id taken", ws("a", "other"), 9, func(err error) bool { return errors.Is(err, domain.ErrIDTaken) }},
		{"name taken", ws("b", "alpha"), 9, func(err error) bool { return fault.Is(err, fault.NameTaken) }},
		{"limit", ws("b", "beta"), 1, func(err error) bool { return fault.Is(err, fault.Limit) }},
		{"uid taken", &domain.Workspace{ID: "b", Name: "b", UID: 7}, 9, func(err error) bool { return err != nil }},
		{"cid taken", &domain.Workspace{ID: "b", Name: "b", CID: 100}, 9, func(err error) bool { return err != nil }},
		{"empty name", ws("b", ""), 9, func(err error) bool { return err != nil }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			db := open(t, filepath.Join(t.TempDir(), "state.db"))
			first := ws("a", "alpha")
			first.UID, first.CID = 7, 100
			if err := db.Insert(t.Context(), first, 1); err != nil {
				t.Fatal(err)
			}
			if err := db.Insert(t.Context(), tt.w, tt.limit); !tt.want(err) {
				t.Errorf("Insert: %v", err)
			}
			if all, err := db.List(t.Context()); err != nil || len(all) != 1 {
				t.Errorf("List: %d records, %v; want the first alone", len(all), err)
			}
		})
	}
}

func TestUpdateAndDelete(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "state.db"))
	ctx := t.Context()
	a, b := ws("a", "alpha"), ws("b", "beta")
	b.CreatedAt = a.CreatedAt.Add(-time.Nanosecond)
	for _, w := range []*domain.Workspace{a, b} {
		if err := db.Insert(ctx, w, 2); err != nil {
			t.Fatal(err)
		}
	}
	a.State, a.Name = domain.Running, "gamma"
	if err := db.Update(ctx, a); err != nil {
		t.Fatal(err)
	}
	taken := *a
	taken.Name = "beta"
	if err := db.Update(ctx, &taken); !fault.Is(err, fault.NameTaken) {
		t.Errorf("rename to a taken name: %v", err)
	}
	if err := db.Update(ctx, ws("c", "c")); !fault.Is(err, fault.NotFound) {
		t.Errorf("update of an unknown id: %v", err)
	}
	all, err := db.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]*domain.Workspace{b, a}, all, cmpNet); diff != "" {
		t.Errorf("records, oldest first (-want +got):\n%s", diff)
	}
	for range 2 { // absent is not an error
		if err := db.Delete(ctx, "a"); err != nil {
			t.Fatal(err)
		}
	}
	if all, err := db.List(ctx); err != nil || len(all) != 1 {
		t.Errorf("after the deletion: %v, %v", all, err)
	}
}

// TestRacingInserts has two handles, as two processes would, compete for the
// last places and for each name.
func TestRacingInserts(t *testing.T) {
	const limit, each = 12, 16
	path := filepath.Join(t.TempDir(), "state.db")
	dbs := []*DB{open(t, path), open(t, path)}
	var wg sync.WaitGroup
	errs := make(chan error, 2*each)
	for h, db := range dbs {
		for i := range each {
			wg.Go(func() {
				w := ws(fmt.Sprintf("%d-%02d", h, i), fmt.Sprintf("name-%02d", i)) // both handles want each name
				errs <- db.Insert(t.Context(), w, limit)
			})
		}
	}
	wg.Wait()
	close(errs)
	done := 0
	for err := range errs {
		switch {
		case err == nil:
			done++
		case !fault.Is(err, fault.Limit) && !fault.Is(err, fault.NameTaken):
			t.Errorf("Insert: %v", err)
		}
	}
	all, err := dbs[0].List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if done != limit || len(all) != limit {
		t.Errorf("%d inserts succeeded and %d records exist, want %d", done, len(all), limit)
	}
	names := map[string]bool{}
	for _, w := range all {
		names[w.Name] = true
	}
	if len(names) != limit {
		t.Errorf("%d different names, want %d", len(names), limit)
	}
}

func TestCanceledContext(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "state.db"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := db.Insert(ctx, ws("a", "a"), 1); !errors.Is(err, context.Canceled) {
		t.Errorf("Insert: %v", err)
	}
	if all, err := db.List(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("List: %v, %v", all, err)
	}
}

func BenchmarkUpdate(b *testing.B) {
	db, err := Open(b.Context(), Options{Path: filepath.Join(b.TempDir(), "state.db")})
	if err != nil {
		b.Fatal(err)
	}
	defer db.Close()
	w := fullRecord()
	if err := db.Insert(b.Context(), w, 1); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := db.Update(b.Context(), w); err != nil {
			b.Fatal(err)
		}
	}
}

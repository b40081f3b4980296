package storagetest

import (
	"bufio"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/storage"
)

// snapshots returns the driver's snapshot family or skips.
func (e *env) snapshots() storage.Snapshots {
	s, ok := e.Volumes.(storage.Snapshots)
	if !ok {
		e.Skip("missing capability: snapshots in this driver")
	}
	return s
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func snapshotAndRollBack(e *env) {
	s, ctx := e.snapshots(), e.Context()
	d := e.create("w1", diskBytes)
	e.write(d, 0xa1, 0, mib)
	must(e.T, s.Snapshot(ctx, "w1", "one"))
	e.expect(d, 0xa1, 0, mib)
	e.write(d, 0xa2, 0, mib)
	e.write(d, 0xa2, 8*mib, mib)
	must(e.T, s.Snapshot(ctx, "w1", "two"))
	e.write(d, 0xa3, 0, mib)

	must(e.T, s.RollBack(ctx, "w1", "one"))
	e.expect(d, 0xa1, 0, mib)
	e.expect(d, 0x22, 3*mib, mib)
	e.expect(d, 0, 8*mib, mib)
	e.write(d, 0xa4, 0, mib)

	must(e.T, s.RollBack(ctx, "w1", "two")) // a later one stays
	e.expect(d, 0xa2, 0, mib)
	e.expect(d, 0xa2, 8*mib, mib)
	e.write(d, 0xa5, 0, mib)

	must(e.T, s.RemoveSnapshot(ctx, "w1", "one"))
	must(e.T, s.RemoveSnapshot(ctx, "w1", "one")) // absent is no error
	must(e.T, s.RollBack(ctx, "w1", "two"))       // it does not depend on the first
	e.expect(d, 0xa2, 0, mib)
	must(e.T, s.RemoveSnapshot(ctx, "w1", "two"))
	e.expect(d, 0xa2, 0, mib) // nor the disk on it
	e.expect(d, 0x22, 3*mib, mib)
	must(e.T, e.Own(ctx, "w1", 0))
	must(e.T, e.Remove(ctx, "w1"))
	e.wantList()
}

func snapshotsAreListed(e *env) {
	s, ctx := e.snapshots(), e.Context()
	e.create("w1", diskBytes)
	want := []string{}
	for i := range 4 {
		name := fmt.Sprint(9-i, "-snap")
		must(e.T, s.Snapshot(ctx, "w1", name))
		want = append(want, name)
	}
	s = e.open(e.T).(storage.Snapshots)
	got, err := s.Snapshots(ctx, "w1")
	must(e.T, err)
	if diff := cmp.Diff(want, got); diff != "" {
		e.Errorf("snapshots, oldest first (-want +got):\n%s", diff)
	}
	for _, name := range want[1:] {
		must(e.T, s.RemoveSnapshot(ctx, "w1", name))
	}
	got, err = s.Snapshots(ctx, "w1")
	must(e.T, err)
	if diff := cmp.Diff(want[:1], got, cmpopts.EquateEmpty()); diff != "" {
		e.Errorf("snapshots after removal (-want +got):\n%s", diff)
	}
}

func cloneStandsAlone(e *env) {
	s, ctx := e.snapshots(), e.Context()
	d := e.create("w1", diskBytes)
	e.write(d, 0xa1, 0, mib)
	must(e.T, s.Snapshot(ctx, "w1", "one"))
	e.write(d, 0xa2, 0, mib)
	must(e.T, s.Snapshot(ctx, "w1", "two"))
	e.write(d, 0xa3, 0, mib)

	clone := func(from, name, id string) domain.Disk {
		c, err := s.Clone(ctx, from, name, id)
		must(e.T, err)
		if c.SizeBytes != diskBytes {
			e.Errorf("clone %s has %d bytes, want %d", id, c.SizeBytes, diskBytes)
		}
		must(e.T, e.Own(ctx, id, 0))
		return c
	}
	one, two := clone("w1", "one", "c1"), clone("w1", "two", "c2")
	e.expect(one, 0xa1, 0, mib)
	e.expect(two, 0xa2, 0, mib)
	e.write(two, 0xc2, mib, mib)
	e.expect(d, 0, mib, mib)
	e.wantList("w1", "c1", "c2")

	must(e.T, s.Snapshot(ctx, "c2", "own"))
	third := clone("c2", "own", "c3") // a clone of a clone
	must(e.T, e.Remove(ctx, "w1"))    // the source first,
	must(e.T, e.Remove(ctx, "c2"))    // then the middle
	e.expect(one, 0xa1, 0, mib)
	e.expect(one, 0x22, 3*mib, mib)
	e.expect(third, 0xa2, 0, mib)
	e.expect(third, 0xc2, mib, mib)
	must(e.T, e.Remove(ctx, "c1"))
	must(e.T, e.Remove(ctx, "c3"))
	e.wantList()
}

func snapshotRefuses(e *env) {
	s, ctx := e.snapshots(), e.Context()
	e.create("w1", diskBytes)
	e.create("w2", diskBytes)
	must(e.T, s.Snapshot(ctx, "w1", "one"))
	_, cloneAbsent := s.Clone(ctx, "w1", "none", "c1")
	_, cloneOnto := s.Clone(ctx, "w1", "one", "w2")
	for _, tt := range []struct {
		what string
		err  error
		kind fault.Kind
	}{
		{"a name that is taken", s.Snapshot(ctx, "w1", "one"), fault.NameTaken},
		{"snapshot of an absent disk", s.Snapshot(ctx, "w9", "one"), fault.NotFound},
		{"roll back to an absent snapshot", s.RollBack(ctx, "w1", "none"), fault.NotFound},
		{"clone of an absent snapshot", cloneAbsent, fault.NotFound},
		{"clone onto a disk", cloneOnto, fault.InUse},
	} {
		if !fault.Is(tt.err, tt.kind) || fault.As(tt.err).Next == "" {
			e.Errorf("%s: %v, want a fault of kind %s with a next step", tt.what, tt.err, tt.kind)
		}
	}
	if err := s.RemoveSnapshot(ctx, "w9", "one"); err != nil {
		e.Errorf("removing a snapshot of an absent disk: %v", err)
	}
}

// diskInUse has a process of QEMU's hold the disk as a machine would.
func diskInUse(e *env) {
	s, ctx := e.snapshots(), e.Context()
	d := e.create("w1", diskBytes)
	must(e.T, s.Snapshot(ctx, "w1", "one"))
	cmd := exec.CommandContext(ctx, "qemu-io", "-f", string(d.Format), d.Path)
	in, err := cmd.StdinPipe()
	must(e.T, err)
	out, err := cmd.StdoutPipe()
	must(e.T, err)
	must(e.T, cmd.Start())
	if _, err := in.Write([]byte("length\n")); err != nil {
		e.Fatal(err)
	}
	// Its answer says that the disk is open.
	for lines := bufio.NewScanner(out); lines.Scan() && !strings.Contains(lines.Text(), "MiB"); {
	}
	if err := s.Snapshot(ctx, "w1", "two"); !fault.Is(err, fault.InUse) {
		e.Errorf("Snapshot of a disk in use: %v, want a fault of kind in_use", err)
	}
	if err := s.RollBack(ctx, "w1", "one"); !fault.Is(err, fault.InUse) {
		e.Errorf("RollBack of a disk in use: %v, want a fault of kind in_use", err)
	}
	must(e.T, in.Close())
	must(e.T, cmd.Wait())
	must(e.T, s.Snapshot(ctx, "w1", "two"))
	must(e.T, s.RollBack(ctx, "w1", "one"))
}

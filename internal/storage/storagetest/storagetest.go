// Package storagetest holds storage drivers to the contract of package storage.
//
// A driver's test calls [Run]; what the driver offers beyond
// [storage.Volumes] is found by its type. Contents are written and read as a
// machine would, by QEMU's block layer (qemu-io), so that the suite knows no
// disk format.
package storagetest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/agentiso/agentiso/internal/cmdrun"
	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/storage"
)

const (
	kib = 1 << 10
	mib = 1 << 20

	baseBytes = 4 * mib
	diskBytes = 16 * mib
)

// Open opens the driver under test. Every call of one test must open the same
// place, as a restarted daemon would; the suite closes nothing.
type Open func(t *testing.T) storage.Volumes

// Run runs the suite. fresh returns, for each test, the opener of an empty place.
func Run(t *testing.T, fresh func(t *testing.T) Open) {
	tests := []struct {
		name string
		run  func(*env)
	}{
		{"ReadsAsBaseThenZeros", readsAsBase},
		{"SizeIsRoundedUp", sizeIsRounded},
		{"WritesStayApart", writesStayApart},
		{"QCOW2Base", qcow2Base},
		{"RefusesBadBase", refusesBadBase},
		{"RefusesHostileIDs", refusesHostileIDs},
		{"CreateRefusesWhatExists", createRefuses},
		{"RemoveIsIdempotent", removeIsIdempotent},
		{"AbsentDisk", absentDisk},
		{"OwnKeepsContent", ownKeepsContent},
		{"UsageFollowsWrites", usageFollows},
		{"SurvivesReopening", survivesReopening},
		{"Concurrent", concurrent},
		{"SnapshotAndRollBack", snapshotAndRollBack},
		{"SnapshotsAreListed", snapshotsAreListed},
		{"CloneStandsAlone", cloneStandsAlone},
		{"SnapshotRefuses", snapshotRefuses},
		{"DiskInUse", diskInUse},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			open := fresh(t)
			tt.run(&env{T: t, open: open, Volumes: open(t), base: makeBase(t)})
		})
	}
}

// RunFull holds the driver to the contract on a file system that is full: fill
// takes all of the space that the place of open has left, free gives it back.
func RunFull(t *testing.T, open Open, base domain.Disk, fill, free func()) {
	e := &env{T: t, open: open, Volumes: open(t), base: base}
	kept := e.create("kept", diskBytes)
	e.write(kept, 0xaa, 0, 64*kib)
	fill()
	if _, err := e.Create(t.Context(), "late", base, diskBytes); !fault.Is(err, fault.NoSpace) || fault.As(err).Next == "" {
		t.Errorf("Create on a full disk: %v, want a fault of kind no_space with a next step", err)
	}
	if err := e.Remove(t.Context(), "late"); err != nil {
		t.Errorf("Remove of what did not fit: %v", err)
	}
	e.wantList("kept")
	free()
	e.create("late", diskBytes)
	e.expect(kept, 0xaa, 0, 64*kib)
}

// env is one test's world.
type env struct {
	*testing.T
	storage.Volumes
	open Open
	base domain.Disk
}

// makeBase makes an image: 0x11 in its first MiB, 0x22 in its last, a hole
// between.
func makeBase(t *testing.T) domain.Disk {
	t.Helper()
	for _, tool := range []string{"qemu-io", "qemu-img"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("missing capability: %s", tool)
		}
	}
	path := filepath.Join(t.TempDir(), "base image, raw:1") // a name to be quoted
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, baseBytes); err != nil {
		t.Fatal(err)
	}
	d := domain.Disk{Path: path, Format: domain.Raw, SizeBytes: baseBytes}
	e := &env{T: t}
	e.write(d, 0x11, 0, mib)
	e.write(d, 0x22, 3*mib, mib)
	return d
}

func (e *env) create(id string, size int64) domain.Disk {
	e.Helper()
	d, err := e.Create(e.Context(), id, e.base, size)
	if err != nil {
		e.Fatal(err)
	}
	return d
}

// io runs commands of qemu-io on d.
func (e *env) io(d domain.Disk, commands ...string) (string, error) {
	argv := []string{"qemu-io", "-f", string(d.Format)}
	for _, c := range commands {
		argv = append(argv, "-c", c)
	}
	// After "--" a path is a path; "./" and absolute ones are no protocol.
	out, err := cmdrun.Host(e.Context(), append(argv, "--", d.Path)...)
	return string(out), err
}

func (e *env) write(d domain.Disk, pattern byte, at, n int64) {
	e.Helper()
	if out, err := e.io(d, fmt.Sprintf("write -P %d %d %d", pattern, at, n)); err != nil || strings.Contains(out, "failed") {
		e.Fatalf("write to %s at %d: %v: %s", d.Path, at, err, out)
	}
}

// expect fails unless n bytes of d from at on are all pattern.
func (e *env) expect(d domain.Disk, pattern byte, at, n int64) {
	e.Helper()
	if out, err := e.io(d, fmt.Sprintf("read -P %d %d %d", pattern, at, n)); err != nil || strings.Contains(out, "failed") {
		e.Errorf("%s at %d is not %#x: %v: %s", d.Path, at, pattern, err, out)
	}
}

func (e *env) wantList(ids ...string) {
	e.Helper()
	got, err := e.List(e.Context())
	if err != nil {
		e.Fatal(err)
	}
	slices.Sort(got)
	slices.Sort(ids)
	if diff := cmp.Diff(ids, got, cmpopts.EquateEmpty()); diff != "" {
		e.Errorf("List (-want +got):\n%s", diff)
	}
}

func readsAsBase(e *env) {
	d := e.create("w1", diskBytes)
	if d.SizeBytes != diskBytes {
		e.Errorf("size %d, want %d", d.SizeBytes, diskBytes)
	}
	e.expect(d, 0x11, 0, mib)
	e.expect(d, 0, mib, 2*mib)
	e.expect(d, 0x22, 3*mib, mib)
	e.expect(d, 0, baseBytes, diskBytes-baseBytes)
	if _, err := e.io(d, fmt.Sprintf("read %d 512", diskBytes)); err == nil {
		e.Error("the disk goes on past its size")
	}
	e.wantList("w1")
}

func sizeIsRounded(e *env) {
	for i, tt := range []struct{ ask, want int64 }{
		{0, baseBytes}, {1, baseBytes}, {baseBytes + 1, baseBytes + mib}, {9*mib - 512, 9 * mib}, {20 << 30, 20 << 30},
	} {
		d := e.create(fmt.Sprint("w", i), tt.ask)
		if d.SizeBytes != tt.want {
			e.Errorf("asked for %d: %d bytes, want %d", tt.ask, d.SizeBytes, tt.want)
		}
		e.expect(d, 0x11, 0, mib)
		if tt.want > baseBytes {
			e.expect(d, 0, tt.want-512, 512)
		}
	}
	for _, bad := range []int64{1 << 62} {
		if _, err := e.Create(e.Context(), "big", e.base, bad); err == nil {
			e.Errorf("a disk of %d bytes was made", bad)
		}
	}
}

func writesStayApart(e *env) {
	before, err := os.ReadFile(e.base.Path)
	if err != nil {
		e.Fatal(err)
	}
	a, b := e.create("a", diskBytes), e.create("b", diskBytes)
	e.write(a, 0xaa, 512*kib, 4*kib)
	e.write(a, 0xab, baseBytes+mib+512, 512) // less than any cluster
	e.write(b, 0xbb, 512*kib, mib)
	e.expect(a, 0xaa, 512*kib, 4*kib)
	e.expect(a, 0x11, 0, 512*kib)
	e.expect(a, 0x11, 516*kib, 508*kib)
	e.expect(a, 0xab, baseBytes+mib+512, 512)
	e.expect(a, 0, baseBytes+mib, 512)
	e.expect(b, 0xbb, 512*kib, mib)
	if after, err := os.ReadFile(e.base.Path); err != nil || !slices.Equal(before, after) {
		e.Errorf("the base has changed (%v)", err)
	}
}

func qcow2Base(e *env) {
	path := filepath.Join(e.TempDir(), "base.qcow2")
	if _, err := cmdrun.Host(e.Context(), "qemu-img", "convert", "-f", "raw", "-O", "qcow2", e.base.Path, path); err != nil {
		e.Fatal(err)
	}
	d, err := e.Create(e.Context(), "w1", domain.Disk{Path: path, Format: domain.QCOW2, SizeBytes: baseBytes}, diskBytes)
	if fault.Is(err, fault.Unsupported) {
		e.Skip("missing capability: qcow2 images in this driver")
	}
	if err != nil {
		e.Fatal(err)
	}
	e.expect(d, 0x22, 3*mib, mib)
	e.expect(d, 0, baseBytes, mib)
}

func refusesBadBase(e *env) {
	good := e.base
	tests := []struct {
		name string
		base func(domain.Disk) domain.Disk
		kind fault.Kind
	}{
		{"absent", func(d domain.Disk) domain.Disk { d.Path += "-absent"; return d }, fault.NotFound},
		{"relative", func(d domain.Disk) domain.Disk { d.Path = "base.raw"; return d }, fault.Invalid},
		{"zero byte", func(d domain.Disk) domain.Disk { d.Path += "\x00"; return d }, fault.Invalid},
		{"empty", func(d domain.Disk) domain.Disk { d.Path = ""; return d }, fault.Invalid},
		{"format", func(d domain.Disk) domain.Disk { d.Format = "vmdk"; return d }, fault.Invalid},
		{"cut off", func(d domain.Disk) domain.Disk { d.SizeBytes *= 2; return d }, fault.Internal},
	}
	for _, tt := range tests {
		if _, err := e.Create(e.Context(), "w1", tt.base(good), diskBytes); !fault.Is(err, tt.kind) {
			e.Errorf("base %s: %v, want a fault of kind %s", tt.name, err, tt.kind)
		}
		if err := e.Remove(e.Context(), "w1"); err != nil {
			e.Error(err)
		}
	}
	e.wantList()
}

// hostile are ids that lead elsewhere, hide, or break what they are pasted into.
var hostile = []string{
	"", ".", "..", "../w1", "a/b", "/etc", "w1/", "-rf", "@snap", ".hidden", "W1", "w 1", "w1\n", "w\x001", "wé", "w*", "$(id)", "w1@s", strings.Repeat("w", 64),
}

func refusesHostileIDs(e *env) {
	ctx := e.Context()
	e.create("w1", diskBytes)
	for _, id := range hostile {
		_, created := e.Create(ctx, id, e.base, diskBytes)
		_, measured := e.UsedBytes(ctx, id)
		calls := map[string]error{"Create": created, "Remove": e.Remove(ctx, id), "Own": e.Own(ctx, id, 0), "UsedBytes": measured}
		if s, ok := e.Volumes.(storage.Snapshots); ok {
			_, cloned := s.Clone(ctx, "w1", "s", id)
			_, listed := s.Snapshots(ctx, id)
			calls["Clone"], calls["Snapshots"] = cloned, listed
			calls["Snapshot"], calls["Snapshot name"] = s.Snapshot(ctx, id, "s"), s.Snapshot(ctx, "w1", id)
			calls["RollBack"], calls["RollBack name"] = s.RollBack(ctx, id, "s"), s.RollBack(ctx, "w1", id)
			calls["RemoveSnapshot"], calls["RemoveSnapshot name"] = s.RemoveSnapshot(ctx, id, "s"), s.RemoveSnapshot(ctx, "w1", id)
		}
		for verb, err := range calls {
			if !fault.Is(err, fault.Invalid) {
				e.Errorf("%s(%q): %v, want a fault of kind invalid", verb, id, err)
			}
		}
	}
	e.wantList("w1")
}

func createRefuses(e *env) {
	d := e.create("w1", diskBytes)
	e.write(d, 0xaa, 0, mib)
	if _, err := e.Create(e.Context(), "w1", e.base, diskBytes); !fault.Is(err, fault.InUse) {
		e.Errorf("Create of what exists: %v, want a fault of kind in_use", err)
	}
	e.expect(d, 0xaa, 0, mib)
}

func removeIsIdempotent(e *env) {
	ctx := e.Context()
	d := e.create("w1", diskBytes)
	other := e.create("w2", diskBytes)
	e.write(d, 0xaa, 0, mib)
	for range 2 {
		if err := e.Remove(ctx, "w1"); err != nil {
			e.Error(err)
		}
	}
	if err := e.Remove(ctx, "never-was"); err != nil {
		e.Error(err)
	}
	if _, err := os.Lstat(d.Path); !errors.Is(err, os.ErrNotExist) {
		e.Errorf("%s is still there (%v)", d.Path, err)
	}
	e.wantList("w2")
	e.expect(e.create("w1", diskBytes), 0x11, 0, mib) // nothing of the old one shows
	e.expect(other, 0x11, 0, mib)
}

func absentDisk(e *env) {
	if err := e.Own(e.Context(), "w1", 0); !fault.Is(err, fault.NotFound) {
		e.Errorf("Own: %v", err)
	}
	if _, err := e.UsedBytes(e.Context(), "w1"); !fault.Is(err, fault.NotFound) {
		e.Errorf("UsedBytes: %v", err)
	}
	e.wantList()
}

func ownKeepsContent(e *env) {
	d := e.create("w1", diskBytes)
	e.write(d, 0xaa, 0, mib)
	uids := []int{0, os.Geteuid()}
	if os.Geteuid() == 0 {
		uids = []int{0, 1_900_000_000, 1_900_000_001, 0}
	} else if err := e.Own(e.Context(), "w1", os.Geteuid()+1); !fault.Is(err, fault.Missing) {
		e.Errorf("Own for another user without root: %v, want a fault of kind missing", err)
	}
	for _, uid := range uids {
		if err := e.Own(e.Context(), "w1", uid); err != nil {
			e.Error(err)
		}
		e.expect(d, 0xaa, 0, mib)
	}
}

func usageFollows(e *env) {
	d := e.create("w1", 64*mib)
	used := func() int64 {
		n, err := e.UsedBytes(e.Context(), "w1")
		if err != nil {
			e.Fatal(err)
		}
		return n
	}
	empty := used()
	if empty < 0 || empty > mib {
		e.Errorf("an empty disk holds %d bytes", empty)
	}
	e.write(d, 0xaa, 0, 8*mib)
	if n := used(); n < empty+7*mib || n > empty+10*mib {
		e.Errorf("after 8 MiB were written the disk holds %d bytes, %d before", n, empty)
	}
}

func survivesReopening(e *env) {
	d := e.create("w1", diskBytes)
	e.write(d, 0xaa, 0, mib)
	e.Volumes = e.open(e.T)
	e.wantList("w1")
	e.expect(d, 0xaa, 0, mib)
	if err := e.Remove(e.Context(), "w1"); err != nil {
		e.Error(err)
	}
	e.wantList()
}

func concurrent(e *env) {
	var wg sync.WaitGroup
	var ids []string
	disks := make([]domain.Disk, 24)
	for i := range disks {
		id := fmt.Sprintf("w%02d", i)
		if i%3 != 0 {
			ids = append(ids, id)
		}
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(e.Context(), time.Minute)
			defer cancel()
			d, err := e.Create(ctx, id, e.base, diskBytes)
			if err != nil {
				e.Error(err)
				return
			}
			disks[i] = d
			_, err1 := e.List(ctx)
			_, err2 := e.UsedBytes(ctx, id)
			err3 := e.Own(ctx, id, 0)
			if err := errors.Join(err1, err2, err3); err != nil {
				e.Error(err)
			}
			if i%3 == 0 {
				if err := e.Remove(ctx, id); err != nil {
					e.Error(err)
				}
			}
		})
	}
	wg.Wait()
	e.wantList(ids...)
	e.expect(disks[1], 0x11, 0, mib)
}

//go:build vm

package qemu

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/qemu/qmp"
)

// TestStateRoundTrip keeps the shape of a machine such that its memory and
// device state can be captured and restored; see the package's doc.
func TestStateRoundTrip(t *testing.T) {
	w := vmWorld(t, nil)
	s := w.vmSpec("one")
	p := w.boot(s)
	if err := w.Close(); err != nil { // the monitor serves one client
		t.Fatal(err)
	}
	w.Owner = w.open()
	ctx := t.Context()
	c, err := qmp.Dial(ctx, filepath.Join(p.RunDir, qmpSocket), qmp.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(c.Do(ctx, "stop", nil, nil))
	statePath, memPath := filepath.Join(w.dir, "state"), filepath.Join(w.dir, "mem")
	state, err := os.OpenFile(statePath, os.O_CREATE|os.O_WRONLY, 0o600)
	must(err)
	must(c.DoFiles(ctx, "add-fd", map[string]int{"fdset-id": 1}, nil, state))
	state.Close()
	began := time.Now()
	must(c.Do(ctx, "xen-save-devices-state", map[string]any{"filename": "/dev/fdset/1", "live": false}, nil))
	st, err := os.Stat(statePath)
	must(err)
	t.Logf("device state: %d bytes in %v", st.Size(), time.Since(began))
	copyMemory(t, p.PID, s.MemoryMiB<<20, memPath)
	must(w.Kill(ctx, "one"))

	// The restored machine, by the same arguments save for those named in the
	// package's doc.
	dir := w.runDir("two")
	must(dir.make())
	l := Launch{RunDir: string(dir), Accel: TCG, TBSizeMiB: 64}
	in, err := w.inherit(dir, s, &l)
	must(err)
	defer in.close()
	args, err := Args(s, l)
	must(err)
	build, err := w.Version(ctx)
	must(err)
	restored := []string{build.Path}
	for i := 0; i < len(args); i++ {
		switch a := args[i]; {
		case a == "-kernel" || a == "-initrd" || a == "-append":
			i++
		case a == "-S":
		case strings.HasPrefix(a, "memory-backend-ram,"):
			restored = append(restored, strings.Replace(a, "memory-backend-ram,", "memory-backend-file,share=off,mem-path="+memPath+",", 1))
		default:
			restored = append(restored, a)
		}
	}
	h, err := spawn(append(restored, "-incoming", "defer"), in.files, 0, nil)
	must(err)
	defer h.close()
	in.close()
	c2, err := qmp.Dial(ctx, dir.path(qmpSocket), qmp.Options{})
	if err != nil {
		t.Fatal(err, dir.lastWords())
	}
	defer c2.Close()
	saved, err := os.Open(statePath)
	must(err)
	defer saved.Close()
	must(c2.DoFiles(ctx, "getfd", map[string]string{"fdname": "state"}, nil, saved))
	must(c2.Do(ctx, "migrate-incoming", map[string]string{"uri": "fd:state"}, nil))
	var status struct{ Status string }
	w.await("the restored machine's running", func() bool {
		must(c2.Do(ctx, "query-status", nil, &status))
		return status.Status == "running"
	})
	two := domain.Process{PID: h.pid, RunDir: string(dir), Endpoint: domain.Endpoint{Socket: dir.path(agentSocket)}}
	w.tell(two, "ping")
	if words := dir.lastWords(); words != "" {
		t.Errorf("QEMU said %q", words)
	}
	if diff := cmp.Diff([]string{"two"}, listed(t, w)); diff != "" {
		t.Errorf("machines (-want +got):\n%s", diff)
	}
	must(w.Kill(ctx, "two"))
	h.reap()
}

func listed(t *testing.T, w *world) []string {
	t.Helper()
	l, err := w.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// copyMemory writes the guest's memory, the only mapping of just that size, to
// path.
func copyMemory(t *testing.T, pid int, size int64, path string) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Skipf("missing capability: reading another process's memory: %v", err)
	}
	defer mem.Close()
	out, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		if _, err := fmt.Sscanf(line, "%x-%x", &from, &to); err != nil || to-from != size {
			continue
		}
		page := make([]byte, 1<<20)
		for at := int64(0); at < size; at += int64(len(page)) {
			if _, err := mem.ReadAt(page, from+at); err != nil {
				t.Fatal(err)
			}
			if _, err := out.WriteAt(page, at); err != nil {
				t.Fatal(err)
			}
		}
		return
	}
	t.Fatalf("no mapping of %d bytes", size)
}

//go:build vm

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/agentiso/agentiso/client"
)

// pending starts a command that does not end, and returns how the call to it
// ended: with an error, and before long.
func pending(t *testing.T, c *client.Client, ref string, argv ...string) func() *client.Error {
	t.Helper()
	p, err := c.StartProcess(t.Context(), ref, argv, client.ExecOptions{User: "root"})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := p.Wait()
		ended <- err
	}()
	return func() *client.Error {
		t.Helper()
		began := time.Now()
		select {
		case err = <-ended:
		case <-time.After(time.Minute):
			t.Fatal("the call goes on")
		}
		t.Logf("the call ended after %v: %v", time.Since(began).Round(time.Millisecond), err)
		e, ok := errors.AsType[*client.Error](err)
		if !ok {
			t.Fatalf("the call ended with %v", err)
		}
		return e
	}
}

// becomes waits until a workspace is in a state, and returns it.
func (h *testHost) becomes(c *client.Client, ref string, state client.State) (w *client.Workspace) {
	h.t.Helper()
	h.eventually(fmt.Sprintf("%s to be %s", ref, state), func() (err error) {
		if w, err = c.Get(h.t.Context(), ref); err == nil && w.State != state {
			err = fmt.Errorf("it is %s: %s", w.State, w.Reason)
		}
		return err
	})
	return w
}

// TestEnds ends daemon, machine and guest in turn under a running command: its
// call ends with the reason, and the workspace can go on.
func TestEnds(t *testing.T) {
	h := newTestHost(t, "")
	c := h.start("")
	w := h.create(c, client.CreateOptions{Name: "box"})
	sh(t, c, "box", "echo kept > /root/file; echo memory > /dev/shm/file; sync")
	unavailable := func(t *testing.T, e *client.Error, says string) {
		t.Helper()
		if e.Kind != client.Unavailable || !strings.Contains(e.Message, says) || e.Next == "" {
			t.Errorf("the call ended with %s: %s (next: %s), want %q", e.Kind, e.Message, e.Next, says)
		}
	}
	adopted := func(t *testing.T) {
		t.Helper()
		got := h.becomes(c, "box", client.Running)
		if got.MachinePID != w.MachinePID {
			t.Errorf("the machine is %d, and was %d", got.MachinePID, w.MachinePID)
		}
		if out := sh(t, c, "box", "cat /dev/shm/file"); out != "memory" {
			t.Errorf("the guest's memory has %q", out)
		}
		// A command outlives the call that began it, as the protocol has it.
		if n := sh(t, c, "box", "ps | grep -c '[s]leep 700'; killall sleep"); n != "1" {
			t.Errorf("%s cut commands run on, not 1", n)
		}
	}

	t.Run("daemon killed", func(t *testing.T) {
		h.t = t
		ended := pending(t, c, "box", "sleep", "7001")
		h.kill()
		unavailable(t, ended(), "daemon went away")
		c = h.start("")
		adopted(t)
	})
	t.Run("daemon shut down", func(t *testing.T) {
		h.t = t
		ended := pending(t, c, "box", "sleep", "7002")
		if err := c.Shutdown(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		unavailable(t, ended(), "")
		if err := h.wait(); err != nil {
			t.Errorf("the daemon left with %v", err)
		}
		c = h.start("")
		adopted(t)
	})
	// The machine was started by a daemon that is gone, and by this one.
	for _, whose := range []string{"adopted", "own"} {
		t.Run("QEMU killed, "+whose, func(t *testing.T) {
			h.t = t
			ended := pending(t, c, "box", "sleep", "7003")
			if err := syscall.Kill(h.becomes(c, "box", client.Running).MachinePID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			unavailable(t, ended(), "the link to the agent of workspace "+w.ID)
			got := h.becomes(c, "box", client.Failed)
			want := "QEMU was killed by signal 9 (SIGKILL)"
			if whose == "adopted" {
				want = "ended; how is unknown"
			}
			if !strings.HasPrefix(got.Reason, want) || got.MachinePID != 0 {
				t.Errorf("the workspace is %+v, want the reason %q", got, want)
			}
			_, err := c.Exec(t.Context(), "box", []string{"true"}, client.ExecOptions{})
			if client.KindOf(err) != client.WrongState || !strings.Contains(err.Error(), got.Reason) {
				t.Errorf("a command in a failed workspace: %v", err)
			}
			if _, _, err := c.Start(t.Context(), "box"); err != nil {
				t.Fatal(err)
			}
			if out := sh(t, c, "box", "cat /root/file"); out != "kept" {
				t.Errorf("the disk has %q", out)
			}
		})
	}
	for _, how := range []string{"poweroff", "reboot -f"} {
		t.Run(how, func(t *testing.T) {
			h.t = t
			// The call that ends its own guest may or may not see itself end.
			_, _ = c.Exec(t.Context(), "box", strings.Fields(how), client.ExecOptions{})
			got := h.becomes(c, "box", client.Stopped)
			if got.Reason != "guest shut down" {
				t.Errorf("the reason is %q", got.Reason)
			}
			if _, _, err := c.Start(t.Context(), "box"); err != nil {
				t.Fatal(err)
			}
			if out := sh(t, c, "box", "cat /root/file"); out != "kept" {
				t.Errorf("the disk has %q", out)
			}
		})
	}
	h.t = t
	h.destroy(c, "box")
	if left := h.left(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestDebianKernel boots the distribution's kernel once: with the agent as
// init, a disk that grew to what was asked for, and at last a panic.
func TestDebianKernel(t *testing.T) {
	h := newTestHost(t, "")
	c := h.start("")
	all, err := c.Kernels(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	name := ""
	for _, k := range all {
		if strings.HasPrefix(k.Name, "debian-") || strings.HasPrefix(k.Name, "ubuntu-") {
			name = k.Name
		}
	}
	if name == "" {
		t.Skip("missing capability: the distribution's kernel (`agentiso kernel fetch`)")
	}
	const gib = 1 << 30
	w := h.create(c, client.CreateOptions{Name: "box", Kernel: name, Image: "dev", DiskBytes: 20 * gib})
	if w.Kernel != name || w.DiskBytes != 20*gib {
		t.Errorf("made %+v", w)
	}
	var size int64
	out := sh(t, c, "box", "uname -r; stat -f -c '%S*%b' / | sed 's/.*/echo $((&))/' | sh; lsmod | grep -c virtio; df -h / | tail -1")
	lines := strings.Split(out, "\n")
	if len(lines) != 4 || !strings.HasSuffix(name, lines[0]) {
		t.Fatalf("in a guest of kernel %s:\n%s", name, out)
	}
	if _, err := fmt.Sscan(lines[1], &size); err != nil || size < 19*gib || size > 20*gib {
		t.Errorf("the file system has %d bytes: %s", size, lines[3])
	}

	ended := pending(t, c, "box", "sh", "-c", "sync; echo c > /proc/sysrq-trigger; sleep 600")
	if e := ended(); e.Kind != client.Unavailable {
		t.Errorf("the call ended with %s: %v", e.Kind, e)
	}
	if got := h.becomes(c, "box", client.Failed); got.Reason != "guest kernel panic: sysrq triggered crash" {
		t.Errorf("the reason is %q", got.Reason)
	}
	var console strings.Builder
	err = c.Logs(t.Context(), "box", client.LogsOptions{}, func(b []byte) error { console.Write(b); return nil })
	if err != nil || !strings.Contains(console.String(), "Kernel panic - not syncing: sysrq triggered crash") {
		t.Errorf("the console of a guest that panicked (%v) has\n%s", err, console.String())
	}
	h.destroy(c, "box")
	if left := h.left(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestSystemd boots an image whose own init runs, with the agent beside it.
func TestSystemd(t *testing.T) {
	h := newTestHost(t, "")
	h.env = []string{"AGENTISO_VM_BOOT_TIMEOUT=4m"}
	c := h.start("")
	w := h.create(c, client.CreateOptions{Name: "box", Image: "systemd", Init: "image"})
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	var out strings.Builder
	_, err := c.Exec(ctx, "box", []string{"sh", "-c", `
		until s=$(systemctl is-system-running --wait 2>/dev/null); [ "$s" = running ] || [ "$s" = degraded ]; do sleep 0.2; done
		echo $s`}, client.ExecOptions{Stdout: &out, Stderr: &out})
	if err != nil {
		t.Fatalf("the system did not come up: %v: %s", err, out.String())
	}
	t.Log("the system is", out.String())
	facts := sh(t, c, "box", `hostname; cat /etc/machine-id | wc -c; cat /proc/1/comm; systemctl list-units --failed --no-legend --plain; pidof @agentiso-guest agentiso-guest >/dev/null; true`)
	if want := w.Hostname + "\n33\nsystemd"; facts != want {
		t.Errorf("the guest has\n%s\nnot\n%s", facts, want)
	}
	if _, err := c.Stop(ctx, "box", false); err != nil {
		t.Fatal(err)
	}
	var console strings.Builder
	if err := c.Logs(ctx, "box", client.LogsOptions{}, func(b []byte) error { console.Write(b); return nil }); err != nil {
		t.Fatal(err)
	}
	if log := console.String(); !strings.Contains(log, "reboot: ") {
		t.Errorf("the guest was not shut down but cut off; its console ends with\n%s", log[max(0, len(log)-2048):])
	}
	h.destroy(c, "box")
	if left := h.left(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

//go:build vm

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/agentiso/agentiso/client"
	"github.com/agentiso/agentiso/internal/config"
	"github.com/agentiso/agentiso/internal/workspace"
)

// The test binary is also the daemon under test: started with this variable it
// serves the configuration that it names.
const daemonEnv = "AGENTISO_TEST_DAEMON"

// crashEnv makes that daemon kill itself, as SIGKILL does, when it is about to
// take a step ("create/disk").
const crashEnv = "AGENTISO_TEST_CRASH"

func init() {
	path := os.Getenv(daemonEnv)
	if path == "" {
		return
	}
	if at := os.Getenv(crashEnv); at != "" {
		testRecorder = func(r workspace.Recorder) workspace.Recorder { return crashAt{r, at} }
	}
	cfg, err := config.Load(path, config.ThisHost())
	if err == nil {
		log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
		err = serve(context.Background(), cfg, log, func() {})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

type crashAt struct {
	workspace.Recorder
	at string
}

func (c crashAt) Begin(ctx context.Context, op, step, id string) (context.Context, func(error)) {
	if op+"/"+step == c.at {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		for {
			_ = syscall.Pause() // until it arrives
		}
	}
	return c.Recorder.Begin(ctx, op, step, id)
}

// testHost is what a daemon under test keeps on this host: directories that
// outlive it, and its processes.
type testHost struct {
	t      testing.TB
	dir    string // data
	run    string
	config string
	log    string
	env    []string            // of the daemon, beside this process's
	cred   *syscall.Credential // whose the daemon and the command line are; nil: ours
	exe    string              // the test binary, where cred may run it; "": as it is
	agent  string              // likewise the guest agent
	proc   *exec.Cmd
}

// testData is where the tier's preparation put kernels and images.
func testData(t testing.TB) string {
	t.Helper()
	made := os.Getenv("AGENTISO_TEST_DATA")
	if made == "" {
		t.Skip("missing capability: kernels and images (AGENTISO_TEST_DATA; `make test` makes them)")
	}
	return made
}

// newTestHost makes the directories. Kernels and images are hard links to
// those that the tier's preparation made.
func newTestHost(t testing.TB, extra string) *testHost {
	t.Helper()
	made := testData(t)
	data, err := os.MkdirTemp(made, "test-")
	if err != nil {
		t.Fatal(err)
	}
	run, err := os.MkdirTemp("", "agt-") // short: sockets have 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	h := &testHost{t: t, dir: data, run: run, config: filepath.Join(run, "c.toml"), log: filepath.Join(run, "log")}
	t.Cleanup(h.clean)
	for _, store := range []string{"images", "kernels"} {
		if err := linkTree(filepath.Join(made, store), filepath.Join(data, store)); err != nil {
			t.Fatal(err)
		}
	}
	text := fmt.Sprintf("[server]\ndata_dir = %q\nrun_dir = %q\n[vm]\naccel = \"tcg\"\nkernel = \"lean\"\n[images]\ndefault_image = \"minimal\"\n%s", data, run, extra)
	if err := os.WriteFile(h.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return h
}

// start runs a daemon that crashes at a step, "" for none, and returns a
// client once its socket answers.
func (h *testHost) start(crash string) *client.Client {
	h.t.Helper()
	log, err := os.OpenFile(h.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		h.t.Fatal(err)
	}
	defer log.Close()
	agent, err := filepath.Abs(cmp.Or(h.agent, filepath.Join(os.Getenv("AGENTISO_TEST_BIN"), agentName)))
	if err != nil {
		h.t.Fatal(err)
	}
	h.proc = exec.Command(cmp.Or(h.exe, os.Args[0]))
	h.proc.Env = append(os.Environ(), daemonEnv+"="+h.config, crashEnv+"="+crash, "AGENTISO_GUEST_BINARY="+agent)
	h.proc.Env = append(h.proc.Env, h.env...)
	h.proc.Stdout, h.proc.Stderr = log, log
	h.proc.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: h.cred}
	if err := h.proc.Start(); err != nil {
		h.t.Fatal(err)
	}
	c, err := client.New(client.Options{Socket: h.socket()})
	if err != nil {
		h.t.Fatal(err)
	}
	h.eventually("the daemon to answer", func() error {
		_, err := c.Info(context.Background())
		return err
	})
	return c
}

func (h *testHost) socket() string { return filepath.Join(h.run, "agentiso.sock") }

// wait returns when the daemon's process has ended.
func (h *testHost) wait() error {
	err := h.proc.Wait()
	h.proc = nil
	return err
}

// kill ends the daemon as a power cut does.
func (h *testHost) kill() {
	if h.proc != nil {
		_ = h.proc.Process.Kill()
		_ = h.wait()
	}
}

// eventually polls until ok returns nil.
func (h *testHost) eventually(what string, ok func() error) {
	h.t.Helper()
	var err error
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
		if err = ok(); err == nil {
			return
		}
		select {
		case <-h.t.Context().Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
	log, _ := os.ReadFile(h.log)
	h.t.Fatalf("waited a minute for %s: %v\ndaemon's log:\n%s", what, err, log[max(0, len(log)-4096):])
}

// clean ends what is left and checks that nothing else was.
func (h *testHost) clean() {
	h.kill()
	for _, pid := range h.machines() {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	if h.t.Failed() {
		log, _ := os.ReadFile(h.log)
		h.t.Logf("daemon's log:\n%s", log[max(0, len(log)-8192):])
	}
	for _, dir := range []string{h.dir, h.run} {
		if err := os.RemoveAll(dir); err != nil {
			h.t.Error(err)
		}
	}
}

// machines lists the QEMU processes of this host.
func (h *testHost) machines() []int {
	var pids []int
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		b, err := os.ReadFile(p)
		if err != nil || !strings.Contains(string(b), h.run+"/") || !strings.Contains(string(b), "qemu-system") {
			continue
		}
		var pid int
		if _, err := fmt.Sscanf(p, "/proc/%d/cmdline", &pid); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// left lists what is on the host of workspaces, whatever the records say.
func (h *testHost) left() []string {
	var all []string
	for _, pattern := range []string{h.dir + "/disks/*", h.dir + "/consoles/*", h.run + "/m/*", h.run + "/p/*"} {
		names, _ := filepath.Glob(pattern)
		all = append(all, names...)
	}
	for _, pid := range h.machines() {
		all = append(all, fmt.Sprintf("qemu process %d", pid))
	}
	return all
}

// sh runs a shell command in a workspace.
func sh(t *testing.T, c *client.Client, ref, script string) string {
	t.Helper()
	var out, errb strings.Builder
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	code, err := c.Exec(ctx, ref, []string{"/bin/sh", "-c", script}, client.ExecOptions{Stdout: &out, Stderr: &errb, User: "root"})
	if err != nil || code != 0 {
		t.Fatalf("%s in %s: code %d, %v, %s", script, ref, code, err, errb.String())
	}
	return strings.TrimSpace(out.String())
}

// TestDaemonKilledAtEachStep kills the daemon at each step of create, stop and
// destroy, starts it again, and finds nothing of what was cut off and the
// bystander undisturbed: same machine, same processes, same memory.
func TestDaemonKilledAtEachStep(t *testing.T) {
	h := newTestHost(t, "")
	c := h.start("")
	by, _, err := c.Create(t.Context(), client.CreateOptions{Name: "bystander"})
	if err != nil {
		t.Fatal(err)
	}
	sh(t, c, "bystander", "echo $$ > /dev/shm/mark; (while :; do date +%s > /dev/shm/beat; sleep 1; done) >/dev/null 2>&1 &")
	if _, _, err := c.Create(t.Context(), client.CreateOptions{Name: "a"}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Stop(t.Context(), "a", true); err != nil {
		t.Fatal(err)
	}
	atRest := len(h.left())

	ops := []struct {
		op    string
		steps []string
		run   func(*client.Client) error
	}{
		{"create", []string{"disk", "network", "machine", "boot", "configure", "record"}, func(c *client.Client) error {
			_, _, err := c.Create(t.Context(), client.CreateOptions{Name: "new"})
			return err
		}},
		{"stop", []string{"shutdown", "machine", "network", "record"}, func(c *client.Client) error {
			if _, _, err := c.Start(t.Context(), "a"); err != nil {
				t.Fatal(err)
			}
			_, err := c.Stop(t.Context(), "a", false)
			return err
		}},
		{"destroy", []string{"machine", "network", "disk", "record"}, func(c *client.Client) error {
			if _, _, err := c.Create(t.Context(), client.CreateOptions{Name: "new"}); err != nil {
				t.Fatal(err)
			}
			_, err := c.Destroy(t.Context(), "new")
			return err
		}},
	}
	h.kill()
	for _, o := range ops {
		for _, step := range o.steps {
			t.Run(o.op+"/"+step, func(t *testing.T) {
				h.t = t
				c := h.start(o.op + "/" + step)
				err := o.run(c)
				if e, ok := errors.AsType[*client.Error](err); !ok || e.Kind != client.Unavailable {
					t.Errorf("the caller was told %v, want that the daemon went away", err)
				}
				_ = h.wait() // it is dead: by its own hand, or never

				c = h.start("")
				defer h.kill()
				all, err := c.List(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				states := map[string]string{}
				for _, w := range all {
					states[w.Name] = string(w.State)
				}
				if len(states) != 2 || states["bystander"] != "running" || states["a"] != "stopped" {
					t.Errorf("workspaces are %v", states)
				}
				if left := h.left(); len(left) != atRest {
					t.Errorf("left behind: %v", left)
				}
				got, err := c.Get(t.Context(), "bystander")
				if err != nil || got.MachinePID != by.MachinePID {
					t.Errorf("bystander is %+v, %v", got, err)
				}
				if out := sh(t, c, "bystander", "test -s /dev/shm/mark && test $(( $(date +%s) - $(cat /dev/shm/beat) )) -le 20 && echo alive"); out != "alive" {
					t.Errorf("bystander says %q", out)
				}
			})
		}
	}
	h.t = t
	c = h.start("")
	for _, name := range []string{"a", "bystander"} {
		if _, err := c.Destroy(t.Context(), name); err != nil {
			t.Error(err)
		}
	}
	if left := h.left(); len(left) != 0 {
		t.Errorf("left behind at the end: %v", left)
	}
}

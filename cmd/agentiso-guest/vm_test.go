//go:build vm

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	guestv1 "github.com/agentiso/agentiso/api/agentiso/guest/v1"
	"github.com/agentiso/agentiso/api/agentiso/guest/v1/guestv1connect"
	"github.com/agentiso/agentiso/api/process"
	"github.com/agentiso/agentiso/api/process/processconnect"
	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/image"
	"github.com/agentiso/agentiso/internal/image/kernel"
	"github.com/agentiso/agentiso/internal/link"
	"github.com/agentiso/agentiso/internal/qemu"
)

// bootLimit bounds one boot: systemd under TCG on a loaded host took 40 s.
const bootLimit = 3 * time.Minute

// testStore is the kernel store of AGENTISO_TEST_DATA with this tree's agent.
func testStore(t *testing.T) *kernel.Store {
	t.Helper()
	data := os.Getenv("AGENTISO_TEST_DATA")
	if data == "" {
		t.Skip("missing capability: AGENTISO_TEST_DATA, a data directory with kernels and images")
	}
	agent := filepath.Join(t.TempDir(), "agentiso-guest")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", agent, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build agent: %v\n%s", err, out)
	}
	s, err := kernel.Open(kernel.Options{Dir: filepath.Join(data, "kernels"), AgentPath: agent, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// kernels are the kernels to test with: those of the store by kind.
func kernels(t *testing.T, s *kernel.Store) map[string]domain.Boot {
	t.Helper()
	list, _, err := s.Kernels(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	boots := map[string]domain.Boot{}
	for _, k := range list {
		kind, _, _ := strings.Cut(k.Name, "-")
		b, err := s.Boot(t.Context(), k.Name)
		if err != nil {
			t.Fatal(err)
		}
		boots[kind] = b
	}
	if len(boots) == 0 {
		t.Skip("missing capability: a kernel in AGENTISO_TEST_DATA")
	}
	return boots
}

// machine is one machine of the product's own making, with its link.
type machine struct {
	t     *testing.T
	owner *qemu.Owner
	rt    http.RoundTripper
	began time.Time
}

const machineID = "guest000"

func start(t *testing.T, b domain.Boot, init, disk string) *machine {
	t.Helper()
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("missing capability: qemu-system-x86_64")
	}
	dir, err := os.MkdirTemp("", "g") // short: a socket's path has 108 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	owner, err := qemu.NewOwner(qemu.Options{RunDir: filepath.Join(dir, "r"), ConsoleDir: filepath.Join(dir, "c")})
	if err != nil {
		t.Fatal(err)
	}
	hub := link.NewHub(link.Options{Boot: bootLimit})
	m := &machine{t: t, owner: owner, rt: hub.Transport(machineID), began: time.Now()}
	t.Cleanup(func() {
		hub.Close(machineID)
		if t.Failed() {
			t.Logf("console:\n%s", m.console())
		}
		if err := owner.Kill(context.Background(), machineID); err != nil {
			t.Error(err)
		}
		if err := owner.Close(); err != nil {
			t.Error(err)
		}
	})
	p, err := owner.Start(t.Context(), domain.MachineSpec{
		ID: machineID, Boot: b, Init: init, CPUs: 1, MemoryMiB: 512,
		Disk: domain.Disk{Path: disk, Format: domain.Raw},
		Slot: domain.NetworkSlot{Driver: "user", MAC: "52:54:00:12:34:56", Address: netip.MustParsePrefix("10.0.2.15/24"), Restrict: true},
		Link: domain.LinkSerial,
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := hub.Open(machineID, p.Endpoint); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *machine) console() string { return string(m.owner.Tail(machineID, 1<<16)) }

// until polls cond until it holds or the machine has ended.
func (m *machine) until(what string, cond func() bool) {
	m.t.Helper()
	limit := time.After(bootLimit)
	tick := time.NewTicker(500 * time.Millisecond) // each look may cost an emulated exec
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-limit:
			m.t.Fatalf("waited %v for %s", bootLimit, what)
		case <-m.owner.Done(machineID):
			m.t.Fatalf("machine ended while waiting for %s", what)
		}
	}
}

// ended waits for QEMU's end.
func (m *machine) ended() {
	m.t.Helper()
	select {
	case <-m.owner.Done(machineID):
	case <-time.After(bootLimit):
		m.t.Fatal("QEMU goes on")
	}
}

func (m *machine) guest() guestv1connect.GuestClient {
	return guestv1connect.NewGuestClient(&http.Client{Transport: m.rt}, "http://agent")
}

func (m *machine) info(ctx context.Context) *guestv1.InfoResponse {
	m.t.Helper()
	res, err := m.guest().Info(ctx, connect.NewRequest(&guestv1.InfoRequest{}))
	if err != nil {
		m.t.Fatal(err)
	}
	return res.Msg
}

// run runs a command in the guest and returns what it printed.
func (m *machine) run(ctx context.Context, argv ...string) (string, error) {
	c := processconnect.NewProcessClient(&http.Client{Transport: m.rt}, "http://agent")
	stream, err := c.Start(ctx, connect.NewRequest(&process.StartRequest{
		Process: &process.ProcessConfig{Cmd: argv[0], Args: argv[1:]},
	}))
	if err != nil {
		return "", err
	}
	defer stream.Close()
	var out strings.Builder
	for stream.Receive() {
		ev := stream.Msg().GetEvent()
		out.Write(ev.GetData().GetStdout())
		out.Write(ev.GetData().GetStderr())
		if end := ev.GetEnd(); end != nil && (end.GetExitCode() != 0 || !end.GetExited()) {
			err = fmt.Errorf("%s: %s", argv[0], end.GetStatus())
		}
	}
	return out.String(), errors.Join(err, stream.Err())
}

func (m *machine) mustRun(ctx context.Context, argv ...string) string {
	m.t.Helper()
	out, err := m.run(ctx, argv...)
	if err != nil {
		m.t.Fatalf("%v: %v\n%s", argv, err, out)
	}
	return out
}

// busyboxDisk makes a root disk of Debian's static busybox, as prepare has
// changed it.
func busyboxDisk(t *testing.T, prepare func(root string)) string {
	t.Helper()
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("missing capability: /bin/busybox (busybox-static)")
	}
	root := t.TempDir()
	for _, d := range []string{"bin", "etc", "root", "run/mysqld/sub", "var"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(root, "bin/busybox"), busybox, 0o755)
	for _, applet := range []string{"sh", "cat", "ls", "ps", "id", "sleep", "stat", "mount", "poweroff", "touch", "sync", "grep", "readlink", "wget", "ip"} {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", applet)); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(root, "etc/passwd"), []byte("root:x:0:0:root:/root:/bin/sh\n"), 0o644)
	write(t, filepath.Join(root, "etc/group"), []byte("root:x:0:\n"), 0o644)
	write(t, filepath.Join(root, "run/stale.pid"), []byte("1\n"), 0o644)
	if err := os.Chmod(filepath.Join(root, "run/mysqld"), 0o770|os.ModeSetgid); err != nil {
		t.Fatal(err)
	}
	if prepare != nil {
		prepare(root)
	}
	return makeDisk(t, root)
}

func makeDisk(t *testing.T, root string) string {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "disk")
	out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-d", root, disk, "64M").CombinedOutput()
	if err != nil {
		t.Skipf("missing capability: mke2fs: %v %s", err, out)
	}
	return disk
}

func write(t *testing.T, path string, data []byte, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, data, mode); err != nil {
		t.Fatal(err)
	}
}

func TestFastMode(t *testing.T) {
	for kind, b := range kernels(t, testStore(t)) {
		t.Run(kind, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
			defer cancel()
			m := start(t, b, "fast", busyboxDisk(t, nil))
			info := m.info(ctx)
			t.Logf("QEMU's start to the first answer %v; boot %v, of it init %v; kernel %s", time.Since(m.began).Round(time.Millisecond),
				time.Duration(info.GetBootNs()), time.Duration(info.GetInitNs()), info.GetKernelRelease())
			if info.GetInitMode() != "fast" || info.GetKernelRelease() != b.Kernel.Release || info.GetBootNs() < info.GetInitNs() {
				t.Errorf("info: %v", info)
			}
			st, err := m.guest().Stats(ctx, connect.NewRequest(&guestv1.StatsRequest{}))
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("after boot: agent's resident memory %d KiB; guest's used memory %d MiB", st.Msg.GetAgentRssBytes()>>10, st.Msg.GetMemoryUsedBytes()>>20)
			mounts := m.mustRun(ctx, "/bin/cat", "/proc/mounts")
			for _, want := range []string{
				"/dev/vda / ext4 rw,", "proc /proc proc", "sysfs /sys sysfs", "devtmpfs /dev devtmpfs", "devpts /dev/pts devpts",
				"tmpfs /dev/shm tmpfs", "tmpfs /run tmpfs", "cgroup2 /sys/fs/cgroup cgroup2",
			} {
				if !strings.Contains(mounts, want) {
					t.Errorf("no mount %q in:\n%s", want, mounts)
				}
			}
			if strings.Contains(mounts, "rootfs") || strings.Contains(mounts, " /tmp ") {
				t.Errorf("mounts:\n%s", mounts)
			}
			for _, tt := range []struct{ name, script, want string }{
				{"device links", "readlink /dev/fd; echo hello | cat /dev/stdin", "/proc/self/fd\nhello\n"},
				{"stale files of /run", "ls /run", "mysqld\n"},
				{"kept directory of /run", "stat -c %a /run/mysqld; ls /run/mysqld", "2770\nsub\n"},
				{"tmp", "stat -c %a /tmp", "1777\n"},
				{"loopback", "ip addr show lo | grep -o 'inet 127.0.0.1/8'", "inet 127.0.0.1/8\n"},
				{"controllers", "for c in cpu io memory pids; do grep -ow $c /sys/fs/cgroup/cgroup.subtree_control; done", "cpu\nio\nmemory\npids\n"},
				{"sysctl", "cat /proc/sys/vm/max_map_count", "262144\n"},
				{"orphan", "(sleep 0.1 &) ; echo ok", "ok\n"},
				{"protection from the OOM killer is not inherited", "cat /proc/self/oom_score_adj", "0\n"},
				{"init", "cat /proc/1/cmdline", "/init\x00"},
			} {
				if got := m.mustRun(ctx, "/bin/sh", "-c", tt.script); got != tt.want {
					t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
				}
			}
			if c := m.console(); strings.Contains(c, "level=WARN") || strings.Contains(c, "level=ERROR") {
				t.Errorf("the agent complains:\n%s", c)
			}
			t.Logf("after %d commands:\n%s", 11, m.mustRun(ctx, "/bin/grep", "-E", "VmRSS|Rss", "/proc/1/status"))
			began := time.Now()
			if _, err := m.guest().Shutdown(ctx, connect.NewRequest(&guestv1.ShutdownRequest{})); err != nil {
				t.Fatal(err)
			}
			m.ended()
			t.Logf("shutdown took %v", time.Since(began).Round(time.Millisecond))
		})
	}
}

// systemdDisk is a disk with the systemd image of AGENTISO_TEST_DATA.
func systemdDisk(t *testing.T) string {
	t.Helper()
	if disk := os.Getenv("AGENTISO_TEST_SYSTEMD_DISK"); disk != "" {
		return copyDisk(t, disk)
	}
	images, err := image.Open(image.Options{Dir: filepath.Join(os.Getenv("AGENTISO_TEST_DATA"), "images")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := images.Close(); err != nil {
			t.Error(err)
		}
	})
	img, err := images.Image(t.Context(), "systemd")
	if err != nil {
		t.Skipf("missing capability: image systemd in AGENTISO_TEST_DATA: %v", err)
	}
	return copyDisk(t, img.Disk.Path)
}

func copyDisk(t *testing.T, from string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "disk")
	if out, err := exec.Command("cp", "--sparse=always", from, to).CombinedOutput(); err != nil {
		t.Fatalf("copy disk: %v %s", err, out)
	}
	return to
}

func TestImageMode(t *testing.T) {
	for kind, b := range kernels(t, testStore(t)) {
		for _, end := range []string{"host", "guest"} {
			t.Run(kind+"/shutdown by "+end, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
				defer cancel()
				m := start(t, b, "image", systemdDisk(t))
				if info := m.info(ctx); info.GetInitMode() != "image" {
					t.Errorf("info: %v", info)
				}
				t.Logf("answers after %v", time.Since(m.began).Round(time.Millisecond))
				m.until("systemd to be up", func() bool {
					out, _ := m.run(ctx, "/bin/systemctl", "is-system-running", "--wait")
					return out == "running\n" || out == "degraded\n"
				})
				t.Logf("systemd is up after %v", time.Since(m.began).Round(time.Millisecond))
				if got := m.mustRun(ctx, "/bin/cat", "/proc/1/comm"); got != "systemd\n" {
					t.Errorf("process 1 is %q", got)
				}
				if got := m.mustRun(ctx, "/bin/sh", "-c", `tr '\0' '\n' < /proc/$PPID/cmdline; cat /proc/$PPID/oom_score_adj /proc/self/oom_score_adj`); got != "@agentiso-guest\n-1000\n0\n" {
					t.Errorf("the agent is %q", got)
				}
				if out, _ := m.run(ctx, "/bin/systemctl", "--failed", "--no-legend", "--plain"); strings.TrimSpace(out) != "" {
					t.Logf("failed units:\n%s", out)
				}
				began := time.Now()
				if end == "host" {
					if _, err := m.guest().Shutdown(ctx, connect.NewRequest(&guestv1.ShutdownRequest{})); err != nil {
						t.Fatal(err)
					}
				} else if out, err := m.run(ctx, "/bin/systemctl", "poweroff"); err != nil {
					// The call may be cut off by what it asked for.
					t.Logf("poweroff: %v %s", err, out)
				}
				m.ended()
				t.Logf("shutdown took %v", time.Since(began).Round(time.Millisecond))
			})
		}
	}
}

// TestBootsThatFail: the last line on the console says why, and QEMU ends.
func TestBootsThatFail(t *testing.T) {
	blank := func(t *testing.T) string {
		disk := filepath.Join(t.TempDir(), "disk")
		write(t, disk, make([]byte, 1<<20), 0o600)
		return disk
	}
	for _, tt := range []struct {
		name, init string
		disk       func(t *testing.T) string
		want       string
	}{
		{"no file system", "fast", blank, "cannot boot: mount root disk /dev/vda as ext4: invalid argument (the disk holds no ext4 file system, or a damaged one)"},
		{"no init", "image", func(t *testing.T) string {
			return busyboxDisk(t, func(root string) { os.Remove(filepath.Join(root, "bin/busybox")) })
		}, "cannot boot: the image has no init"},
		{"broken init", "image", func(t *testing.T) string {
			return busyboxDisk(t, func(root string) {
				if err := os.Mkdir(filepath.Join(root, "sbin"), 0o755); err != nil {
					t.Fatal(err)
				}
				write(t, filepath.Join(root, "sbin/init"), []byte("not a program"), 0o755)
			})
		}, "cannot boot: exec /sbin/init of the image: exec format error"},
		{"proc is a file", "fast", func(t *testing.T) string {
			return busyboxDisk(t, func(root string) { write(t, filepath.Join(root, "proc"), nil, 0o644) })
		}, "cannot boot: mount /proc: not a directory"},
	} {
		for kind, b := range kernels(t, testStore(t)) {
			t.Run(kind+"/"+tt.name, func(t *testing.T) {
				m := start(t, b, tt.init, tt.disk(t))
				m.ended()
				if got := m.console(); !strings.Contains(got, tt.want) {
					t.Errorf("console lacks %q:\n%s", tt.want, got)
				}
			})
		}
	}
}

// TestHostileRoot boots disks made to lead the first process astray.
func TestHostileRoot(t *testing.T) {
	link := func(t *testing.T, root, name, target string) {
		t.Helper()
		path := filepath.Join(root, name)
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, path); err != nil {
			t.Fatal(err)
		}
	}
	for kind, b := range kernels(t, testStore(t)) {
		t.Run(kind, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
			defer cancel()
			m := start(t, b, "fast", busyboxDisk(t, func(root string) {
				link(t, root, "run", "run")           // a loop
				link(t, root, "tmp", "/nowhere")      // dangling
				link(t, root, "init", "/bin/busybox") // not ours to run
				write(t, filepath.Join(root, "modules"), nil, 0o644)
				if err := os.MkdirAll(filepath.Join(root, "dev/shm"), 0o755); err != nil {
					t.Fatal(err)
				}
				link(t, root, "dev/pts", "/etc")
			}))
			if got := m.mustRun(ctx, "/bin/sh", "-c", "echo up; ls /dev/pts/ptmx"); got != "up\n/dev/pts/ptmx\n" {
				t.Errorf("got %q", got)
			}
			if got := m.console(); !strings.Contains(got, "mount /run") {
				t.Errorf("console says nothing of /run:\n%s", got)
			}
		})
	}
}

package boot

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// AsideName is argv[0] of the agent beside an init of the image. systemd spares
// root's processes whose name begins with '@' when it kills everything at the
// end (SYSTEMD.IO/ROOT_STORAGE_DAEMONS): the host's calls are answered until the
// machine is gone.
const AsideName = "@agentiso-guest"

// ShutdownPath is argv[0] of the agent when systemd hands the machine back.
const ShutdownPath = "/shutdown"

// startedEnv carries System.Started to the agent aside.
const startedEnv = "AGENTISO_STARTED_NS"

// inits is where images keep their init, in the order the kernel would try,
// with systemd's own path for images that lack the link. busybox by that name
// acts as init only when it is told to.
var inits = [][]string{
	{"/sbin/init"},
	{"/lib/systemd/systemd"},
	{"/usr/lib/systemd/systemd"},
	{"/etc/init"},
	{"/bin/init"},
	{"/sbin/openrc-init"},
	{"/bin/busybox", "init"},
}

// HandOver starts the agent aside and turns process 1 into the image's init. It
// returns only when that cannot be done; the machine is of no use then.
func (s *System) HandOver() error {
	argv, err := findInit(inits, executable)
	if err != nil {
		return err
	}
	if err := s.keepInitramfs(); err != nil {
		// Without it the image's shutdown may end in a halted machine, which
		// the host has to kill; the boot need not fail for that.
		s.log.Warn("keep initramfs for shutdown", "err", err)
	}
	env := append(os.Environ(), fmt.Sprintf("%s=%d", startedEnv, s.Started))
	aside, err := os.StartProcess("/proc/self/exe", []string{AsideName}, &os.ProcAttr{
		Dir:   "/",
		Env:   env,
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("start agent beside init: %w", err)
	}
	err = syscall.Exec(argv[0], argv, []string{"HOME=/", "TERM=linux", "PATH=" + defaultPath})
	_ = aside.Kill()
	return fmt.Errorf("exec %s of the image: %w", argv[0], err)
}

// Aside restores, in the agent aside, what it has to know of the boot. It also
// guards the agent from the OOM killer: unlike process 1 it can be chosen, and
// a machine without its agent is lost. Children must be set back to zero.
func Aside(log *slog.Logger) (*System, error) {
	text, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, err
	}
	s := &System{initramfs: -1, log: log}
	if s.Cmdline, err = ParseCmdline(string(text)); err != nil {
		return nil, err
	}
	var ns int64
	if _, err := fmt.Sscanf(os.Getenv(startedEnv), "%d", &ns); err == nil {
		s.Started = time.Duration(ns)
	}
	if err := os.Unsetenv(startedEnv); err != nil {
		return nil, err
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		log.Warn("guard agent from the OOM killer", "err", err)
	}
	return s, nil
}

// findInit picks the first candidate that ok accepts.
func findInit(candidates [][]string, ok func(path string) bool) ([]string, error) {
	for _, argv := range candidates {
		if ok(argv[0]) {
			return argv, nil
		}
	}
	return nil, errors.New("the image has no init (looked for /sbin/init, systemd, OpenRC and busybox): use an image with one, or init = \"fast\"")
}

func executable(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0
}

// keepInitramfs puts the initramfs where systemd looks for it when everything
// else is down: it moves into /run/initramfs and runs /shutdown, that is, the
// agent again ([FinishShutdown]). A kernel without ACPI cannot switch the
// machine off, so systemd's own last call would leave it halted for ever.
func (s *System) keepInitramfs() error {
	const dir = "/run/initramfs"
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(procFD(s.initramfs), dir, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return unix.Access(filepath.Join(dir, ShutdownPath), unix.X_OK)
}

// FreeInitramfs removes what the initrd unpacked into memory. For an agent that
// stays process 1 nothing needs it; its own pages stay for as long as it runs.
func (s *System) FreeInitramfs() {
	if s.initramfs < 0 {
		return
	}
	for _, name := range []string{"init", "shutdown", "dev", "proc", "sys", "run", "modules", newRoot[1:]} {
		removeTree(s.initramfs, name, 0)
	}
	unix.Close(s.initramfs)
	s.initramfs = -1
}

package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/domain"
)

// bootID identifies this boot of the host; pids and start times mean nothing
// across it.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read host boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// startTicks is when pid started, in clock ticks since the host's boot. A
// zombie counts as gone.
func startTicks(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	return parseStat(b)
}

// parseStat reads fields 3 (state) and 22 (start time) of /proc/PID/stat. Field
// 2 is the command's name in parentheses and may hold anything, so fields are
// counted from its last parenthesis.
func parseStat(b []byte) (uint64, error) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return 0, errors.New("stat has no command")
	}
	f := bytes.Fields(b[i+1:])
	const state, start = 0, 22 - 3 // the first here is the third there
	if len(f) <= start {
		return 0, errors.New("stat is short")
	}
	if s := f[state]; len(s) == 1 && (s[0] == 'Z' || s[0] == 'X') {
		return 0, os.ErrNotExist
	}
	return strconv.ParseUint(string(f[start]), 10, 64)
}

// runDirOf returns the run directory that pid's command line names, "" if it is
// not a machine's process (or is gone, or has no command line any more).
func runDirOf(pid int) string {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	if err != nil {
		return ""
	}
	return parseMark(b)
}

// parseMark finds the -name that Args puts first.
func parseMark(cmdline []byte) string {
	args := strings.SplitN(string(cmdline), "\x00", 4)
	if len(args) < 4 || args[1] != "-name" {
		return ""
	}
	dir, ok := strings.CutPrefix(args[2], "guest=")
	if !ok {
		return ""
	}
	return strings.ReplaceAll(dir, ",,", ",")
}

// processesUnder finds the processes of machines whose run directories are
// children of parent: pids by base name.
func processesUnder(parent string) (map[string][]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	found := map[string][]int{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if dir := runDirOf(pid); dir != "" && filepath.Dir(dir) == parent {
			if _, err := startTicks(pid); err == nil {
				found[filepath.Base(dir)] = append(found[filepath.Base(dir)], pid)
			}
		}
	}
	return found, nil
}

// A handle is a pidfd: it means one process for ever.
type handle struct {
	pid int
	f   *os.File
}

// newHandle takes fd over. Non-blocking, it is waited for by the runtime's
// poller and not by a thread for each machine.
func newHandle(pid, fd int) (*handle, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	return &handle{pid, os.NewFile(uintptr(fd), "pidfd")}, nil
}

// openProcess returns a handle of the very process p, or
// [domain.ErrNoMachine].
func openProcess(p domain.Process) (*handle, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	if p.PID <= 0 || p.BootID != boot {
		return nil, domain.ErrNoMachine
	}
	return openChecked(p.PID, func() bool {
		t, err := startTicks(p.PID)
		return err == nil && t == p.StartTicks && runDirOf(p.PID) == p.RunDir
	})
}

// openMarked returns a handle of pid if it is the process of the machine in
// runDir, or [domain.ErrNoMachine].
func openMarked(pid int, runDir string) (*handle, error) {
	return openChecked(pid, func() bool { return runDirOf(pid) == runDir })
}

// openChecked opens pid first and then asks whether it is the right one: what
// is true of the pid while the handle's process has not been reaped is true of
// the handle.
func openChecked(pid int, right func() bool) (*handle, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) { // gone, or now a thread's id
		return nil, domain.ErrNoMachine
	}
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, os.NewSyscallError("pidfd_open", err))
	}
	h, err := newHandle(pid, fd)
	if err != nil {
		return nil, err
	}
	if !right() || h.ended() {
		h.close()
		return nil, domain.ErrNoMachine
	}
	return h, nil
}

// wait returns nil when the process has ended, and an error once the handle is
// closed.
func (h *handle) wait() error {
	raw, err := h.f.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool { return readable(int(fd)) })
}

// ended reports whether the process has ended; a zombie has.
func (h *handle) ended() bool {
	ended := false
	if raw, err := h.f.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { ended = readable(int(fd)) })
	}
	return ended
}

func readable(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(p, 0)
	return err == nil && n == 1
}

// kill sends SIGKILL. A process that has ended is not an error.
func (h *handle) kill() error {
	raw, err := h.f.SyscallConn()
	if err != nil {
		return err
	}
	var kerr error
	if err := raw.Control(func(fd uintptr) { kerr = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) }); err != nil {
		return err
	}
	if kerr != nil && !errors.Is(kerr, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", h.pid, os.NewSyscallError("pidfd_send_signal", kerr))
	}
	return nil
}

// reap collects the status of an ended process if it is this one's child.
func (h *handle) reap() (syscall.WaitStatus, bool) {
	var ws syscall.WaitStatus
	pid, err := syscall.Wait4(h.pid, &ws, syscall.WNOHANG, nil)
	return ws, err == nil && pid == h.pid
}

func (h *handle) close() { _ = h.f.Close() } // reading ends with it; nothing to lose

// ids returns the sorted union of its arguments' elements that can be ids.
func ids(lists ...[]string) []string {
	var all []string
	for _, l := range lists {
		for _, id := range l {
			if idPattern.MatchString(id) {
				all = append(all, id)
			}
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

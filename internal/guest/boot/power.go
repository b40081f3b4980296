package boot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// killWait bounds the wait for killed processes to be gone. One in
	// uninterruptible sleep may never be.
	killWait = 500 * time.Millisecond
	// syncWait bounds writing the page cache out when the caller set no bound:
	// a full 2 GiB of it to a slow disk.
	syncWait = 60 * time.Second
	// readOnlyWait bounds the remount of the root.
	readOnlyWait = 2 * time.Second
	// imageGrace is the least time an image's own init gets: systemd under TCG
	// took 3.5 s to stop an idle system, 7 s on a loaded host.
	imageGrace = 15 * time.Second
	// exitPoll is the interval of looks at processes that are to end.
	exitPoll = 2 * time.Millisecond
)

// PowerOff ends the machine: processes get SIGTERM, after grace SIGKILL, then
// file systems are synced, the root is made read-only and the machine ends. An
// idle machine waits for nothing and is gone in milliseconds. In mode image the
// image's init is asked to shut down first and given grace, but at least 15 s;
// what it has not done by then is done without it.
//
// PowerOff returns only when ctx is done before data could be synced, or when
// the kernel refused; ctx does not shorten grace otherwise.
func PowerOff(ctx context.Context, grace time.Duration) error {
	if os.Getpid() != 1 {
		if err := askInit(); err == nil {
			sleep(ctx, max(grace, imageGrace))
		}
	}
	stopProcesses(ctx, grace)
	limit, cancel := context.WithTimeout(ctx, syncWait)
	defer cancel()
	// sync(2) cannot be interrupted, so the wait for it has to be.
	if err := within(limit, func() error { unix.Sync(); return nil }); err != nil {
		return fmt.Errorf("power off: sync: %w", err)
	}
	ro, cancel := context.WithTimeout(ctx, readOnlyWait)
	defer cancel()
	// All data is on the disk: a root that stays writable costs the next boot
	// a journal replay, no more.
	_ = within(ro, settleRoot)
	return endMachine()
}

// FinishShutdown is the agent as /shutdown: systemd has stopped everything and
// made this process 1 of an initramfs.
func FinishShutdown(log *slog.Logger) {
	unix.Sync()
	err := endMachine()
	log.Error("end machine", "err", err)
}

// endMachine makes QEMU end. It is run with -no-reboot, so a reset ends it as
// well as a power-off does, and only a machine with ACPI can be powered off:
// without, the kernel would just halt. With reboot=t on the command line the
// reset is a triple fault, immediate on microvm, which has no keyboard
// controller to ask.
func endMachine() error {
	cmd := unix.LINUX_REBOOT_CMD_RESTART
	if canPowerOff() {
		cmd = unix.LINUX_REBOOT_CMD_POWER_OFF
	}
	return os.NewSyscallError("reboot", unix.Reboot(cmd))
}

// canPowerOff tells whether the kernel runs with ACPI.
func canPowerOff() bool {
	_, err := os.Stat("/sys/firmware/acpi/tables")
	return err == nil
}

// fiFreeze is FIFREEZE of the kernel's include/uapi/linux/fs.h.
const fiFreeze = 0xC0045877

// settleRoot makes the root file system clean on its disk: read-only, or, when
// something still writes to it, frozen.
func settleRoot() error {
	if unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, "") == nil {
		return nil
	}
	fd, err := unix.Open("/", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.IoctlSetInt(fd, fiFreeze, 0)
}

// stopProcesses ends every process but this one and process 1.
func stopProcesses(ctx context.Context, grace time.Duration) {
	procs := userProcesses("/proc")
	if len(procs) == 0 {
		return
	}
	_ = unix.Kill(-1, unix.SIGTERM)
	for _, p := range procs {
		// An interactive shell ignores SIGTERM and obeys the loss of its
		// terminal; a stopped process obeys nothing until it goes on.
		if p.terminal {
			_ = unix.Kill(p.pid, unix.SIGHUP)
		}
	}
	_ = unix.Kill(-1, unix.SIGCONT)
	if waitGone(ctx, procs, grace) {
		// Only those that were there at first; they may have left children.
		if procs = userProcesses("/proc"); len(procs) == 0 {
			return
		}
	}
	_ = unix.Kill(-1, unix.SIGKILL)
	waitGone(ctx, userProcesses("/proc"), killWait)
}

// waitGone waits until each of procs has ended, a zombie being one that has.
func waitGone(ctx context.Context, procs []process, limit time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for _, p := range procs {
		for {
			now, err := readProcess("/proc", p.pid)
			if err != nil || now.ended || now.start != p.start {
				break
			}
			if !sleep(ctx, exitPoll) {
				return false
			}
		}
	}
	return true
}

// process is what /proc/PID/stat says of one.
type process struct {
	pid      int
	start    uint64 // clock ticks since boot; with pid it names the process
	ended    bool   // zombie or dead
	kernel   bool   // a kernel thread
	terminal bool   // has a controlling terminal
}

// userProcesses lists the running processes that are neither kernel threads,
// nor this one, nor process 1.
func userProcesses(root string) []process {
	ents, err := os.ReadDir(root)
	if err != nil {
		return nil
	}
	self := os.Getpid()
	var procs []process
	for _, e := range ents {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == 1 || pid == self {
			continue
		}
		if p, err := readProcess(root, pid); err == nil && !p.kernel && !p.ended {
			procs = append(procs, p)
		}
	}
	return procs
}

func readProcess(root string, pid int) (process, error) {
	text, err := os.ReadFile(filepath.Join(root, strconv.Itoa(pid), "stat"))
	if err != nil {
		return process{}, err
	}
	return parseStat(string(text))
}

// kernelThread is PF_KTHREAD of the kernel's include/linux/sched.h.
const kernelThread = 0x00200000

// parseStat reads proc_pid_stat(5). The command's name is in parentheses and
// the process's own choice: parentheses, spaces and newlines included.
func parseStat(text string) (process, error) {
	open, shut := strings.IndexByte(text, '('), strings.LastIndexByte(text, ')')
	if open < 0 || shut < open {
		return process{}, fs.ErrInvalid
	}
	pid, err := strconv.Atoi(strings.TrimSpace(text[:open]))
	f := strings.Fields(text[shut+1:]) // f[0] is field 3
	if err != nil || len(f) < 20 {
		return process{}, fs.ErrInvalid
	}
	tty, err1 := strconv.Atoi(f[4])
	flags, err2 := strconv.ParseUint(f[6], 10, 32)
	start, err3 := strconv.ParseUint(f[19], 10, 64)
	if err := errors.Join(err1, err2, err3); err != nil {
		return process{}, err
	}
	return process{
		pid:      pid,
		start:    start,
		ended:    f[0] == "Z" || f[0] == "X",
		kernel:   flags&kernelThread != 0,
		terminal: tty != 0,
	}, nil
}

// within runs fn, which cannot be stopped, and waits for it until ctx is done.
// The machine ends right after, and the goroutine with it.
func within(ctx context.Context, fn func() error) error {
	done := make(chan error, 1)
	go func() { done <- fn() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// sleep waits for d; false means that ctx was done first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

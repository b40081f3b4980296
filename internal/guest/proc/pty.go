package proc

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/guest/users"
)

// The size of a terminal whose client names none.
const (
	defaultColumns = 80
	defaultRows    = 24
)

// openTerminal opens a new pseudo-terminal of the given size whose slave
// belongs to u, so that programs can open it by name. The master does not
// block. Both are the caller's to close.
//
// Nothing is looked up by a name that a user of the guest could have replaced
// but /dev/ptmx, and what it leads to is asked whether it is one.
func openTerminal(u users.User, cols, rows uint16) (master, slave *os.File, err error) {
	const flags = unix.O_RDWR | unix.O_NOCTTY | unix.O_CLOEXEC
	fd, err := unix.Open("/dev/ptmx", flags|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENOENT) {
		fd, err = unix.Open("/dev/pts/ptmx", flags|unix.O_NONBLOCK, 0)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("open terminal: open /dev/ptmx: %w", err)
	}
	master = os.NewFile(uintptr(fd), "/dev/ptmx")
	defer func() {
		if err != nil {
			_ = master.Close()
		}
	}()
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, nil, fmt.Errorf("open terminal: unlock: %w", err)
	}
	peer, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, flags)
	if errno != 0 {
		return nil, nil, fmt.Errorf("open terminal: open slave: %w", errno)
	}
	slave = os.NewFile(peer, "/dev/pts")
	if err := setSize(master, cols, rows); err != nil {
		_ = slave.Close()
		return nil, nil, fmt.Errorf("open terminal: %w", err)
	}
	if os.Geteuid() == 0 {
		// The group is devpts's own choice ("gid=" of the mount).
		if err := slave.Chown(int(u.UID), -1); err != nil {
			_ = slave.Close()
			return nil, nil, fmt.Errorf("open terminal: give it to %s: %w", u.Name, err)
		}
	}
	return master, slave, nil
}

// setSize sets the terminal's size; the foreground process group gets
// SIGWINCH if it changed.
func setSize(master *os.File, cols, rows uint16) error {
	raw, err := master.SyscallConn()
	if err != nil {
		return err
	}
	var ierr error
	err = raw.Control(func(fd uintptr) {
		ierr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Col: cols, Row: rows})
	})
	if err != nil {
		return err
	}
	if ierr != nil {
		return fmt.Errorf("set terminal size: %w", ierr)
	}
	return nil
}

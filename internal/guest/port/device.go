package port

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrHostGone reports that nobody is connected on the host's side.
var ErrHostGone = errors.New("nobody is connected on the host's side")

// A Device is one virtio-serial port. One goroutine reads and one writes.
type Device interface {
	// Read reads what has arrived, at least one byte. While nobody is
	// connected on the host it waits for somebody if wait is true, and
	// returns io.EOF otherwise.
	Read(p []byte, wait bool) (int, error)
	// Write writes all of p, or returns ErrHostGone.
	Write(p []byte) (int, error)
	// SetDeadline makes pending and coming calls fail with
	// os.ErrDeadlineExceeded after t; the zero time lifts it.
	SetDeadline(t time.Time) error
	Close() error
}

// findWait is how long OpenDevice waits for the port to appear: its driver
// announces the name a few milliseconds after the device.
const findWait = 5 * time.Second

// OpenDevice opens the virtio-serial port of that name. It waits up to five
// seconds for the driver to announce it, or until ctx is done. /sys and /dev
// must be mounted.
func OpenDevice(ctx context.Context, name string) (Device, error) {
	ctx, cancel := context.WithTimeout(ctx, findWait)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		node, err := findPort("/sys/class/virtio-ports", name)
		if err == nil {
			return openNode(filepath.Join("/dev", node))
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("find virtio port %s: %w", name, err)
		}
	}
}

// findPort returns the device name, such as vport0p1, of the port that the
// host has named name.
func findPort(class, name string) (string, error) {
	files, err := filepath.Glob(filepath.Join(class, "*", "name"))
	if err != nil {
		return "", err
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(b)) == name {
			return filepath.Base(filepath.Dir(f)), nil
		}
	}
	return "", os.ErrNotExist
}

// virtioPort is a Device on the kernel's character device. It goes around
// os.File's Read because that takes the 0 bytes which the driver returns with
// nobody connected for the end of the file.
type virtioPort struct {
	f  *os.File
	rc syscall.RawConn
}

func openNode(path string) (Device, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, fmt.Errorf("open agent port %s: %w", path, err)
	}
	return newVirtioPort(fd, path)
}

func newVirtioPort(fd int, path string) (Device, error) {
	// A non-blocking descriptor joins the runtime's epoll, which is
	// edge-triggered: the port's lasting EPOLLHUP wakes nobody by itself, but
	// every change of it does.
	f := os.NewFile(uintptr(fd), path)
	rc, err := f.SyscallConn()
	if err == nil {
		err = f.SetDeadline(time.Time{}) // refused if the file is not polled
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("poll agent port %s: %w", path, err)
	}
	return &virtioPort{f, rc}, nil
}

func (d *virtioPort) Read(p []byte, wait bool) (n int, err error) {
	if len(p) == 0 {
		return 0, nil
	}
	rerr := d.rc.Read(func(fd uintptr) bool {
		n, err = retry(func() (int, error) { return unix.Read(int(fd), p) })
		switch {
		case errors.Is(err, unix.EAGAIN):
			return false
		case err == nil && n == 0 && wait:
			return false // until the edge of somebody connecting
		}
		return true
	})
	switch {
	case rerr != nil:
		return 0, rerr
	case err != nil:
		return 0, os.NewSyscallError("read", err)
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

func (d *virtioPort) Write(p []byte) (int, error) {
	total := 0
	for total < len(p) {
		var n int
		var err error
		werr := d.rc.Write(func(fd uintptr) bool {
			n, err = retry(func() (int, error) { return unix.Write(int(fd), p[total:]) })
			if !errors.Is(err, unix.EAGAIN) {
				return true
			}
			// Full, or nobody there: either way the driver says EAGAIN, and
			// the edge of the host's leaving wakes this up as well.
			if hungUp(fd) {
				err = ErrHostGone
				return true
			}
			return false
		})
		total += max(n, 0)
		if werr == nil {
			werr = err
		}
		if werr != nil {
			return total, werr
		}
	}
	return total, nil
}

func hungUp(fd uintptr) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	_, err := retry(func() (int, error) { return unix.Poll(fds, 0) })
	return err == nil && fds[0].Revents&(unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) != 0
}

func retry(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

func (d *virtioPort) SetDeadline(t time.Time) error { return d.f.SetDeadline(t) }
func (d *virtioPort) Close() error                  { return d.f.Close() }

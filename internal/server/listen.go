package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/agentiso/agentiso/internal/fault"
)

// maxSocketPath is sizeof(sun_path) without its terminating zero; unix(7).
const maxSocketPath = 107

// freshName is what the socket is called while it is being made: short, for
// it must not make the path longer.
const freshName = ".n"

// staleDial bounds asking whether anybody answers on a socket found in place.
const staleDial = time.Second

// Listen makes the Unix socket at path, for the daemon's user alone or, with a
// group, for its members too. Its directory is made when it is missing. A
// socket that a dead daemon left is replaced; one that a living daemon answers
// on is a fault of kind in_use. The socket appears under its name only when it
// has its final owner and mode. Closing the listener removes it.
func Listen(path, group string) (net.Listener, error) {
	if len(path) > maxSocketPath {
		return nil, fault.New(fault.Invalid, "the socket path %s has %d bytes, more than the %d that a Unix socket can have", path, len(path), maxSocketPath).
			WithNext("Set server.socket in the configuration to a shorter path.")
	}
	gid, err := groupID(group)
	if err != nil {
		return nil, err
	}
	dirMode, mode := os.FileMode(0o700), os.FileMode(0o600)
	if group != "" {
		dirMode, mode = 0o755, 0o660
	}
	if err := os.MkdirAll(filepath.Dir(path), dirMode); err != nil {
		return nil, fault.New(fault.Missing, "make the socket's directory: %w", err).
			WithNext("Give the daemon's user the right to write there, or set server.socket in the configuration.")
	}
	if err := clearStale(path); err != nil {
		return nil, err
	}
	fresh := filepath.Join(filepath.Dir(path), freshName)
	if err := os.Remove(fresh); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fault.New(fault.Missing, "remove %s: %w", fresh, err).WithNext("Remove it by hand.")
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fresh, Net: "unix"})
	if err != nil {
		return nil, fault.New(fault.Missing, "listen on %s: %w", path, err).
			WithNext("Give the daemon's user the right to write there, or set server.socket in the configuration.")
	}
	l.SetUnlinkOnClose(false)
	sock := &socket{UnixListener: l, path: path}
	if err := sock.publish(fresh, gid, mode); err != nil {
		_ = l.Close()
		_ = os.Remove(fresh)
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return sock, nil
}

func groupID(group string) (int, error) {
	if group == "" {
		return -1, nil
	}
	if gid, err := strconv.Atoi(group); err == nil && gid >= 0 {
		return gid, nil
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return 0, fault.New(fault.Invalid, "the socket's group: %w", err).
			WithNext("Make it with `groupadd %s`, or change server.socket_group in the configuration.", group)
	}
	gid, err := strconv.Atoi(g.Gid)
	if err != nil {
		return 0, fmt.Errorf("group %s has the id %q: %w", group, g.Gid, err)
	}
	return gid, nil
}

// clearStale removes a socket nobody answers on.
func clearStale(path string) error {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return fault.New(fault.Missing, "look at %s: %w", path, err).WithNext("Set server.socket in the configuration to a path that the daemon may use.")
	case st.Mode()&os.ModeSocket == 0:
		return fault.New(fault.InUse, "%s exists and is not a socket", path).
			WithNext("Move it away, or set server.socket in the configuration to another path.")
	}
	conn, err := (&net.Dialer{Timeout: staleDial}).DialContext(context.Background(), "unix", path)
	if err == nil {
		_ = conn.Close()
	}
	// A full backlog (EAGAIN) or a timeout is a daemon that lives but is busy.
	if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, os.ErrNotExist) {
		return fault.New(fault.InUse, "another daemon answers on %s", path).
			WithNext("Use that one, stop it with `agentiso down`, or set server.socket in the configuration to another path.")
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fault.New(fault.Missing, "remove the stale socket: %w", err).WithNext("Remove it by hand.")
	}
	return nil
}

// socket is a listener that removes its own name, and only its own, when it
// is closed.
type socket struct {
	*net.UnixListener
	path   string
	inode  uint64
	device uint64
	once   sync.Once
}

func (s *socket) publish(fresh string, gid int, mode os.FileMode) error {
	if gid >= 0 {
		if err := os.Chown(fresh, -1, gid); err != nil {
			return fault.New(fault.Missing, "give the socket to its group: %w", err).
				WithNext("Run the daemon as root or as a member of that group, or leave server.socket_group empty.")
		}
	}
	if err := os.Chmod(fresh, mode); err != nil {
		return err
	}
	var st syscall.Stat_t
	if err := syscall.Lstat(fresh, &st); err != nil {
		return err
	}
	s.inode, s.device = st.Ino, st.Dev
	return os.Rename(fresh, s.path)
}

// Close stops listening and removes the socket unless another has taken its
// name.
func (s *socket) Close() error {
	s.once.Do(func() {
		var st syscall.Stat_t
		if syscall.Lstat(s.path, &st) == nil && st.Ino == s.inode && st.Dev == s.device {
			_ = os.Remove(s.path)
		}
	})
	return s.UnixListener.Close()
}

// Addr names the socket as users know it.
func (s *socket) Addr() net.Addr { return &net.UnixAddr{Name: s.path, Net: "unix"} }

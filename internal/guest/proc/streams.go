package proc

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/guest/users"
)

// streams are the descriptors of a process that is being started: the child's
// ends and the agent's.
type streams struct {
	child  [3]*os.File // what the process gets as 0, 1 and 2
	master *os.File    // of a terminal, instead of the pipes
	stdin  [2]*os.File // 1 is the agent's; both nil without standard input
	stdout *os.File    // agent's
	stderr *os.File    // agent's
}

// open opens a terminal of the given size, or pipes if size is nil.
func (s *streams) open(u users.User, size *unix.Winsize, stdin bool) (err error) {
	if size != nil {
		var slave *os.File
		if s.master, slave, err = openTerminal(u, size.Col, size.Row); err != nil {
			return err
		}
		s.child = [3]*os.File{slave, slave, slave}
		return nil
	}
	if stdin {
		s.child[0], s.stdin[1], err = os.Pipe()
	} else {
		s.child[0], err = openNull()
	}
	if err != nil {
		return fmt.Errorf("make standard input: %w", err)
	}
	if s.stdout, s.child[1], err = os.Pipe(); err != nil {
		return fmt.Errorf("make standard output: %w", err)
	}
	if s.stderr, s.child[2], err = os.Pipe(); err != nil {
		return fmt.Errorf("make standard error: %w", err)
	}
	return nil
}

// openNull opens /dev/null and nothing else that may stand in its place.
func openNull() (*os.File, error) {
	fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/null: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(1, 3) {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("open /dev/null: it is not the null device")
	}
	return os.NewFile(uintptr(fd), "/dev/null"), nil
}

// readable is one descriptor that the process writes to.
type readable struct {
	file *os.File
	kind kind
}

func (s *streams) outputs() []readable {
	if s.master != nil {
		return []readable{{s.master, terminal}}
	}
	return []readable{{s.stdout, stdout}, {s.stderr, stderr}}
}

// closeChild closes the child's ends in the agent.
func (s *streams) closeChild() {
	for i, f := range s.child {
		if f != nil && (i == 0 || f != s.child[0]) {
			_ = f.Close()
		}
	}
}

// closeAgent closes the agent's ends: the process was not started.
func (s *streams) closeAgent() {
	for _, f := range []*os.File{s.master, s.stdin[1], s.stdout, s.stderr} {
		if f != nil {
			_ = f.Close()
		}
	}
}

package proc

import (
	"errors"
	"io"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// inheritedGrace is how long after a process's end its output may stay open in
// somebody who inherited it, before the end is reported without waiting for
// more. What the process itself wrote is always read first.
const inheritedGrace = 500 * time.Millisecond

// source is one descriptor that a process writes to: the agent's end of a pipe
// or a terminal's master.
type source struct {
	file *os.File // non-blocking
	raw  syscall.RawConn
	kind kind
}

func newSource(f *os.File, k kind) (*source, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	return &source{file: f, raw: raw, kind: k}, nil
}

// pump moves everything into out until the end of file, or until
// inheritedGrace after exited was called and what was there then has been
// moved. It reports whether the end of file was seen.
func (s *source) pump(out *output) (eof bool) {
	for {
		b, n, err := s.read(true)
		switch {
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded):
			return s.drain(out)
		default:
			return true
		}
		if out.append(s.kind, b, n) != nil {
			return false
		}
	}
}

// exited tells pump that the process has ended.
func (s *source) exited() {
	// Without deadlines (no descriptor of ours) pump would wait for everybody
	// who inherited the pipe; closing is then the lesser evil.
	if err := s.file.SetReadDeadline(time.Now().Add(inheritedGrace)); err != nil {
		_ = s.file.Close()
	}
}

// drain moves what is in the pipe at this moment and no more: somebody who
// inherited it may write for ever.
func (s *source) drain(out *output) (eof bool) {
	var left int
	err := s.raw.Control(func(fd uintptr) {
		n, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ) // FIONREAD, of pipes as well
		if err != nil {
			n = chunkSize
		}
		left = n
	})
	if err != nil {
		return true
	}
	for left > 0 {
		b, n, err := s.read(false)
		if errors.Is(err, unix.EAGAIN) {
			return false
		}
		if err != nil {
			return true
		}
		left -= n
		if out.append(s.kind, b, n) != nil {
			return false
		}
	}
	return false
}

// discard reads on and throws away until the end of file or Close, so that a
// background process that inherited the pipe is not killed by SIGPIPE.
func (s *source) discard() {
	if s.file.SetReadDeadline(time.Time{}) != nil {
		return
	}
	for {
		b, _, err := s.read(true)
		if err != nil {
			return
		}
		buffers.Put(b)
	}
}

// read reads once. A buffer is taken only when there is something to read:
// idle processes hold none.
func (s *source) read(wait bool) (b *[chunkSize]byte, n int, err error) {
	once := func(fd uintptr) bool {
		b = buffers.Get().(*[chunkSize]byte)
		for {
			n, err = unix.Read(int(fd), b[:])
			if err != unix.EINTR {
				break
			}
		}
		if err != nil || n == 0 {
			buffers.Put(b)
			b = nil
		}
		return err != unix.EAGAIN || !wait
	}
	var rerr error
	if wait {
		rerr = s.raw.Read(once)
	} else {
		rerr = s.raw.Control(func(fd uintptr) { once(fd) })
	}
	switch {
	case rerr != nil:
		return nil, 0, rerr
	case err != nil: // EIO: the last descriptor of a terminal's other side is closed
		return nil, 0, err
	case n == 0:
		return nil, 0, io.EOF
	}
	return b, n, nil
}

package servertest

import (
	"context"
	"net"
	"os"
	"sync"
	"syscall"

	"github.com/agentiso/agentiso/internal/fault"
)

// pipeListener accepts what dial makes: pairs of connected Unix sockets, with
// the kernel's small buffers between them, so that back-pressure is real.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once

	mu   sync.Mutex
	open []net.Conn
	dead bool
}

func (l *pipeListener) dial(ctx context.Context) (net.Conn, error) {
	a, b, err := socketPair()
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	if l.dead {
		l.mu.Unlock()
		_ = a.Close()
		_ = b.Close()
		return nil, errGone()
	}
	l.open = append(l.open, a, b)
	l.mu.Unlock()
	select {
	case l.conns <- b:
		return a, nil
	case <-l.closed:
		return nil, errGone()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func errGone() error {
	return fault.New(fault.Unavailable, "the machine has ended").WithNext("Start it again.")
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

func (l *pipeListener) cut() {
	_ = l.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dead = true
	for _, c := range l.open {
		_ = c.Close()
	}
	l.open = nil
}

func socketPair() (a, b net.Conn, err error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	conn := func(fd int) (net.Conn, error) {
		f := os.NewFile(uintptr(fd), "pair")
		defer f.Close()
		return net.FileConn(f)
	}
	if a, err = conn(fds[0]); err != nil {
		_ = syscall.Close(fds[1])
		return nil, nil, err
	}
	if b, err = conn(fds[1]); err != nil {
		_ = a.Close()
		return nil, nil, err
	}
	return a, b, nil
}

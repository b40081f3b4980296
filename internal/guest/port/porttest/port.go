// Package porttest imitates QEMU's virtio-serial port, so that both ends of
// the link can be tested together without a machine: a Unix socket for the
// host, which serves one connection at a time as a QEMU chardev does, and a
// port.Device for the guest.
package porttest

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/agentiso/agentiso/internal/guest/port"
)

// Port is both ends. It is a port.Device; Close is the machine's end.
type Port struct {
	// Unseen hides from the guest that a host has gone, as when the next one
	// connects before the guest has looked. Set it before use.
	Unseen bool

	l *net.UnixListener

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced when conn or deadline change
	conn     net.Conn      // nil while nobody is connected
	deadline time.Time
	closed   bool
	wg       sync.WaitGroup
}

var _ port.Device = (*Port)(nil)

// Listen makes a port whose host side is the Unix socket at path.
func Listen(path string) (*Port, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	p := &Port{l: l, changed: make(chan struct{})}
	p.wg.Go(p.accept)
	return p, nil
}

// accept takes the next host once the last one has gone.
func (p *Port) accept() {
	for {
		c, err := p.l.Accept()
		if err != nil {
			return
		}
		p.mu.Lock()
		if p.closed {
			p.mu.Unlock()
			c.Close()
			return
		}
		p.conn = c
		_ = c.SetDeadline(p.deadline)
		p.change()
		for p.conn == c && !p.closed {
			ch := p.changed
			p.mu.Unlock()
			<-ch
			p.mu.Lock()
		}
		p.mu.Unlock()
	}
}

// change wakes everything that waits; p.mu is held.
func (p *Port) change() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// lost takes c away; nobody is connected then.
func (p *Port) lost(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.conn == c {
		c.Close()
		p.conn = nil
		p.change()
	}
}

// Read is port.Device's.
func (p *Port) Read(b []byte, wait bool) (int, error) {
	for {
		p.mu.Lock()
		c, ch, dl, closed := p.conn, p.changed, p.deadline, p.closed
		p.mu.Unlock()
		switch {
		case closed:
			return 0, os.ErrClosed
		case !dl.IsZero() && !time.Now().Before(dl):
			return 0, os.ErrDeadlineExceeded
		case c == nil && !wait && !p.Unseen:
			return 0, io.EOF
		case c == nil:
			<-ch
			continue
		}
		n, err := c.Read(b)
		if n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
		p.lost(c)
	}
}

// Write is port.Device's.
func (p *Port) Write(b []byte) (int, error) {
	p.mu.Lock()
	c, closed := p.conn, p.closed
	p.mu.Unlock()
	switch {
	case closed:
		return 0, os.ErrClosed
	case c == nil:
		return 0, port.ErrHostGone
	}
	n, err := c.Write(b)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		p.lost(c)
		return n, port.ErrHostGone
	}
	return n, err
}

// SetDeadline is port.Device's.
func (p *Port) SetDeadline(t time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deadline = t
	if p.conn != nil {
		_ = p.conn.SetDeadline(t)
	}
	p.change()
	return nil
}

// Close ends the machine: the host's connection is cut and its socket gone.
func (p *Port) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	if p.conn != nil {
		p.conn.Close()
	}
	p.change()
	p.mu.Unlock()
	err := p.l.Close()
	p.wg.Wait()
	return err
}

package port

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/agentiso/agentiso/internal/link/wire"
)

// Serial is a net.Listener on a virtio-serial port.
type Serial struct {
	*queue
	opts Options
	dev  Device
	// in is the device behind the bytes read too far ahead.
	in   input
	loop sync.WaitGroup

	mu      sync.Mutex
	closing bool // guards against lifting Close's deadline
}

// ListenSerial listens on the virtio-serial port of that name; see
// [OpenDevice] for how it is found and for how long ctx is used.
func ListenSerial(ctx context.Context, name string, opts Options) (*Serial, error) {
	dev, err := OpenDevice(ctx, name)
	if err != nil {
		return nil, err
	}
	return NewSerial(dev, opts), nil
}

// NewSerial listens on dev, which it closes in the end.
func NewSerial(dev Device, opts Options) *Serial {
	s := &Serial{queue: newQueue(), opts: opts, dev: dev, in: input{dev: dev}}
	s.loop.Go(s.run)
	return s
}

// Addr says that it is a serial link.
func (s *Serial) Addr() net.Addr { return addr("serial") }

// Close ends the session and all its connections.
func (s *Serial) Close() error {
	s.end(net.ErrClosed)
	s.mu.Lock()
	s.closing = true
	err := s.dev.SetDeadline(past)
	s.mu.Unlock()
	s.loop.Wait()
	return errors.Join(err, s.dev.Close())
}

// run holds one session after the other until Close, or until the port is
// gone.
func (s *Serial) run() {
	for !s.ended() {
		start, err := s.handshake()
		if err != nil {
			s.end(fmt.Errorf("read agent port: %w", err))
			return
		}
		began := time.Now()
		if start.Mode == wire.Mux {
			err = s.session()
		} else {
			err = s.raw(start)
		}
		s.opts.log().Info("link session ended", "mode", string(start.Mode), "dur", time.Since(began), "err", err)
		s.rearm()
	}
}

// rearm lifts the deadline that ended a session.
func (s *Serial) rearm() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closing {
		_ = s.dev.SetDeadline(time.Time{}) // it was accepted before
	}
}

// handshake reads until a host has said hello and start. Its only errors are
// the port's own.
func (s *Serial) handshake() (wire.Frame, error) {
	s.in.wait = true
	r := bufio.NewReader(&s.in)
	scan := wire.NewScanner(r, -1)
	var nonce wire.Nonce
	greeted := false
	for {
		f, err := scan.Next()
		if err != nil {
			return f, err
		}
		reply := wire.Frame{Mode: f.Mode, Version: wire.Version, Nonce: f.Nonce}
		switch {
		case f.Kind == wire.Hello && (!greeted || f.Nonce != nonce):
			reply.Kind = wire.Welcome
			nonce = f.Nonce
			// Without an answer the host says hello again.
			greeted = s.send(reply) == nil
		case f.Kind == wire.Start && greeted && f.Nonce == nonce:
			reply.Kind = wire.Started
			if s.send(reply) != nil {
				greeted = false
				continue
			}
			rest, _ := r.Peek(r.Buffered())
			s.in.unread(rest)
			return f, nil
		}
	}
}

func (s *Serial) send(f wire.Frame) error {
	_, err := s.dev.Write(f.Append(nil))
	return err
}

// session runs yamux until the host leaves, breaks the protocol (by which a
// new hello announces itself, too) or Close is called.
func (s *Serial) session() error {
	s.in.wait = false
	guard := wire.NewGuard(&channel{s: s}, wire.GuestEnd)
	mux, err := yamux.Server(guard, wire.GuestConfig())
	if err != nil {
		return err
	}
	for {
		st, err := mux.AcceptStream()
		if err != nil {
			break
		}
		s.put(stream{st}, mux.CloseChan())
	}
	_ = mux.Close() // returns once its goroutines are off the device
	s.in.unread(guard.Leftover())
	if err := guard.Err(); !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

// stream is a connection of a session.
type stream struct{ *yamux.Stream }

func (s stream) Write(p []byte) (int, error) { return wire.WriteBodies(s.Stream, p) }

// CloseWrite ends what the host reads; reading goes on.
func (s stream) CloseWrite() error { return s.Stream.Close() }

// Close also ends pending reads, which yamux leaves waiting for the host.
func (s stream) Close() error {
	err := s.Stream.Close()
	_ = s.SetReadDeadline(past) // never fails
	return err
}

// channel is the device as one session's yamux uses it.
type channel struct {
	s     *Serial
	first []byte // scratch: a header and the start of its body
}

func (c *channel) Read(p []byte) (int, error)  { return c.s.in.Read(p) }
func (c *channel) Write(p []byte) (int, error) { return c.s.dev.Write(p) }

// Close frees the session's goroutines from the device but leaves it open.
func (c *channel) Close() error { return c.s.dev.SetDeadline(past) }

// portWrite is the most that the kernel's driver takes in one write.
const portWrite = 32 << 10

// WriteFrame writes a frame with as few writes as the driver allows: each one
// costs an exit to the hypervisor.
func (c *channel) WriteFrame(hdr, body []byte) error {
	n := min(len(body), portWrite-len(hdr))
	c.first = append(append(c.first[:0], hdr...), body[:n]...)
	if _, err := c.s.dev.Write(c.first); err != nil {
		return err
	}
	_, err := c.s.dev.Write(body[n:])
	return err
}

// input is the device's incoming bytes, after those put back.
type input struct {
	dev     Device
	wait    bool // for a host, if there is none
	pending []byte
}

// unread puts b back.
func (in *input) unread(b []byte) {
	in.pending = append(append([]byte(nil), b...), in.pending...)
}

func (in *input) Read(p []byte) (int, error) {
	if len(in.pending) > 0 {
		n := copy(p, in.pending)
		in.pending = in.pending[n:]
		return n, nil
	}
	return in.dev.Read(p, in.wait)
}

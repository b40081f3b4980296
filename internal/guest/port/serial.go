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

// Close ends the session and all its connections, and tells the host.
func (s *Serial) Close() error {
	s.end(net.ErrClosed)
	s.mu.Lock()
	s.closing = true
	err := s.dev.SetDeadline(past)
	s.mu.Unlock()
	s.loop.Wait()
	if s.dev.SetDeadline(time.Now().Add(byeWait)) == nil {
		s.bye()
	}
	return errors.Join(err, s.dev.Close())
}

// byeWait bounds the last words of a listener that is closed.
const byeWait = time.Second

// bye ends whatever session the host believes in. A host that is not there,
// or reads nothing, misses nothing.
func (s *Serial) bye() {
	f := wire.Frame{Kind: wire.Bye, Mode: wire.Mux, Version: wire.Version}
	_, _ = s.dev.Write(f.AppendCopies(nil, wire.Drain))
}

// run holds one session after the other until Close, or until the port is
// gone.
func (s *Serial) run() {
	// An agent before this one may have died in the middle of a session.
	s.bye()
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
		if err != nil && !errors.Is(err, wire.ErrAnew) {
			s.bye()
		}
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
	out := newOutbox(s.dev)
	defer out.loop.Wait()
	guard := wire.NewGuard(channel{&s.in, out}, wire.GuestEnd)
	mux, err := yamux.Server(guard, wire.GuestConfig())
	if err != nil {
		out.fail(err)
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
	in  *input
	out *outbox
}

func (c channel) Read(p []byte) (int, error)  { return c.in.Read(p) }
func (c channel) Write(p []byte) (int, error) { return c.out.Write(p) }

// WriteFrame spares the guard a copy.
func (c channel) WriteFrame(hdr, body []byte) error {
	if _, err := c.out.Write(hdr); err != nil {
		return err
	}
	_, err := c.out.Write(body)
	return err
}

// Close frees the session's goroutines from the device but leaves it open.
func (c channel) Close() error {
	c.out.fail(net.ErrClosed)
	return c.out.dev.SetDeadline(past)
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

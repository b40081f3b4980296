package link

import (
	"context"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/link/wire"
)

// rawBuffer is how much a measurement moves at a time.
const rawBuffer = 64 << 10

// Raw measures the channel to the agent of id without yamux and HTTP. It
// moves bytes (1 to wire.MaxRawBytes): with wire.Sink to the guest, up to its
// word that it has them all; with wire.Source from it; with wire.Echo one by
// one to the guest and back, so that the result is bytes round trips. It
// returns how long that took, the handshake not included.
//
// Pending calls have until ctx is done to finish; they and new ones wait for
// the end of the measurement. A guest that makes no progress for
// wire.WriteLimit ends it with a fault.
func (h *Hub) Raw(ctx context.Context, id string, mode wire.Mode, bytes int64) (time.Duration, error) {
	if bytes < 1 || bytes > wire.MaxRawBytes {
		return 0, fault.New(fault.Invalid, "cannot measure with %d bytes: want 1 to %d", bytes, int64(wire.MaxRawBytes))
	}
	l, err := h.link(id)
	if err != nil {
		return 0, err
	}
	if held := l.hold(ctx, l.measured); held != nil {
		return 0, held
	}
	defer l.unhold(l.measured)
	ctx, cancel := l.within(ctx)
	defer cancel()

	c, err := l.dialRaw(ctx, mode, bytes)
	if err != nil {
		if ctx.Err() != nil {
			return 0, waited(ctx, id, err)
		}
		return 0, errCut(id, err)
	}
	defer c.Close()
	end := context.AfterFunc(ctx, func() { c.Close() })
	defer end()
	began := time.Now()
	if err := move(progress{c}, mode, bytes); err != nil {
		if ctx.Err() != nil {
			return 0, waited(ctx, id, err)
		}
		return 0, errCut(id, fmt.Errorf("measure link: %w", err))
	}
	return time.Since(began), nil
}

// within returns a context that also ends with the link.
func (l *link) within(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.isClosed() {
		cancel()
		return ctx, cancel
	}
	l.tasks.Go(func() {
		select {
		case <-l.closed:
			cancel()
		case <-ctx.Done():
		}
	})
	return ctx, cancel
}

func (l *link) dialRaw(ctx context.Context, mode wire.Mode, size int64) (net.Conn, error) {
	l.mu.Lock()
	serial := l.serial || l.ep.Kind == domain.LinkSerial
	l.mu.Unlock()
	if !serial {
		v := &perStream{ep: l.ep, conns: l.opts.vsock}
		return v.connect(ctx, mode, size)
	}
	return dialSerial(ctx, l.ep.Socket, mode, size)
}

func move(c net.Conn, mode wire.Mode, size int64) error {
	buf := make([]byte, rawBuffer)
	switch mode {
	case wire.Sink:
		for left := size; left > 0; {
			n, err := c.Write(buf[:min(left, rawBuffer)])
			if err != nil {
				return err
			}
			left -= int64(n)
		}
		_, err := io.ReadFull(c, buf[:1])
		return err
	case wire.Source:
		_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.LimitReader(c, size), buf)
		return err
	case wire.Echo:
		for range size {
			if _, err := c.Write(buf[:1]); err != nil {
				return err
			}
			if _, err := io.ReadFull(c, buf[1:2]); err != nil {
				return err
			}
		}
		return nil
	}
	return fmt.Errorf("unknown mode %q", mode)
}

// progress is a connection that must move within wire.WriteLimit.
type progress struct{ net.Conn }

func (p progress) Read(b []byte) (int, error) {
	_ = p.SetDeadline(time.Now().Add(wire.WriteLimit))
	return p.Conn.Read(b)
}

func (p progress) Write(b []byte) (int, error) {
	_ = p.SetDeadline(time.Now().Add(wire.WriteLimit))
	return p.Conn.Write(b)
}

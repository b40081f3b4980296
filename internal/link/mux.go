package link

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/agentiso/agentiso/internal/link/wire"
)

// mux is the carrier of a serial link: yamux behind a guard and an outbox.
type mux struct {
	out   *outbox
	guard *wire.Guard
	yamux *yamux.Session
	opens sync.WaitGroup // goroutines that wait for yamux
}

func newMux(c *channel) (*mux, error) {
	m := &mux{out: newOutbox(c)}
	m.guard = wire.NewGuard(boxed{c, m.out}, wire.HostEnd)
	var err error
	if m.yamux, err = yamux.Client(m.guard, wire.HostConfig()); err != nil {
		m.out.close()
		m.out.loop.Wait()
		return nil, err
	}
	return m, nil
}

// boxed is a channel whose writes go through an outbox.
type boxed struct {
	*channel
	out *outbox
}

func (b boxed) Write(p []byte) (int, error) {
	if err := b.out.write(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (b boxed) WriteFrame(hdr, body []byte) error { return b.out.write(hdr, body) }

func (b boxed) Close() error {
	b.out.close()
	return b.channel.Close()
}

// dial opens a stream in a goroutine: yamux knows no context and waits if too
// many streams have not been acknowledged.
func (m *mux) dial(ctx context.Context) (rawStream, error) {
	type result struct {
		st  *yamux.Stream
		err error
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	ch := make(chan result, 1)
	m.opens.Go(func() {
		st, err := m.yamux.OpenStream()
		ch <- result{st, err}
	})
	select {
	case r := <-ch:
		if r.err != nil {
			return nil, r.err
		}
		return m.stream(r.st), nil
	case <-ctx.Done():
		m.opens.Go(func() {
			if r := <-ch; r.err == nil {
				m.stream(r.st).discard()
			}
		})
		return nil, ctx.Err()
	}
}

func (m *mux) stream(st *yamux.Stream) *muxStream {
	return &muxStream{Stream: st, m: m, flow: m.guard.Flow(st.StreamID())}
}

func (m *mux) probe(ctx context.Context) error {
	answered := make(chan error, 1)
	m.opens.Go(func() {
		_, err := m.yamux.Ping() // within wire.WriteLimit
		answered <- err
	})
	select {
	case err := <-answered:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (m *mux) idle() time.Duration     { return m.guard.Idle() }
func (m *mux) broken() <-chan struct{} { return m.yamux.CloseChan() }

func (m *mux) cause() error {
	// yamux tells its users before the guard has heard: wait for the latter.
	_ = m.yamux.Close()
	err := m.guard.Err()
	if errors.Is(err, net.ErrClosed) { // by yamux, which could not write
		if werr := m.out.failure(); werr != nil {
			return werr
		}
	}
	return err
}

func (m *mux) close() { _ = m.yamux.Close() } // returns once its two goroutines have ended

func (m *mux) wait() {
	m.opens.Wait()
	m.out.loop.Wait()
}

// muxStream is a stream of a mux.
type muxStream struct {
	*yamux.Stream
	m    *mux
	flow *wire.Flow
	wmu  sync.Mutex // held by Write, so that CloseWrite comes after it
	half bool       // CloseWrite was called
}

var errWriteClosed = errors.New("write after the end of writing")

func (st *muxStream) Write(p []byte) (int, error) {
	st.wmu.Lock()
	defer st.wmu.Unlock()
	if st.half {
		return 0, errWriteClosed
	}
	return wire.WriteBodies(st.Stream, p)
}

func (st *muxStream) complete() bool { return st.flow.Finished() }

// closeWrite goes past yamux, which would close the other direction, too,
// after a timeout.
func (st *muxStream) closeWrite() error {
	st.wmu.Lock()
	defer st.wmu.Unlock()
	st.half = true
	return st.m.guard.CloseWrite(st.StreamID())
}

func (st *muxStream) discard() {
	if !st.flow.Finished() {
		_ = st.m.guard.Reset(st.StreamID()) // an error is the session's end
	}
	_ = st.Stream.Close()
}

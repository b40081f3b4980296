package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// MaxWindow is how many bytes a stream's sender may be ahead of its reader;
// it bounds what a guest can make the host hold for one call.
//
// HTTP bodies of 64 MiB go at 41 to 66 % of the raw port's speed from the
// guest (median run: 137 of 232 MB/s) and at 78 to 100 % to it (129 of
// 146 MB/s). Neither yamux's own 256 KiB nor 1 MiB changes that beyond the
// noise; the system calls of the guest's port take three quarters of the
// guest's time. One call takes 0.8 ms; closing the session, reopening it and a
// call take 3 ms. TestRealPort of package link, p50 of 7, QEMU 7.2 TCG, one
// vCPU, on two cores with a load of 6 to 10.
const MaxWindow = 512 << 10

// HeaderSize is a yamux header's length: version, type, flags (2), stream id
// (4), length (4), big-endian.
const HeaderSize = 12

// What yamux frames are made of; see its specification.
const (
	typeData   = 0
	typeWindow = 1
	typePing   = 2
	typeGoAway = 3

	flagSYN = 1
	flagACK = 2
	flagFIN = 4
	flagRST = 8
)

const (
	// maxPings is how many of the host's pings may be unanswered.
	maxPings = 8
	// lateFrames is how many frames without data a peer may send on a stream
	// that has just ended: window updates and a FIN that were on their way.
	lateFrames = 16
	// maxLateFrames and maxLateBytes cap what a session saves up of these.
	maxLateFrames = 64 << 10
	maxLateBytes  = 64 << 20
)

// A ViolationError is a peer that breaks the protocol. The session has ended.
type ViolationError struct{ Detail string }

func (v *ViolationError) Error() string { return v.Detail }

func violation(format string, args ...any) error {
	return &ViolationError{fmt.Sprintf(format, args...)}
}

// ErrAnew is the end of a session whose peer has begun anew: it sent a frame
// of the handshake.
var ErrAnew = errors.New("the other end has begun anew")

// Role is the end of the link that a [Guard] stands at.
type Role int

// The roles. Only the host opens streams and only the host pings.
const (
	HostEnd Role = iota
	GuestEnd
)

// Guard stands between yamux and the channel and lets nothing through that
// the peer has no right to send, because yamux believes its peer: it starts a
// goroutine for every ping, accepts streams that nobody wants, and allocates
// by a frame's length.
//
// The rules for what comes in: known version, types and flags; streams are
// opened by the host alone; data stays within the window granted and
// [MaxBody], window updates within [MaxWindow] and what was sent; each of ACK,
// FIN and RST comes once; no frame without effect; a ping is answered once and
// a guest sends none. So every frame let through was paid for by the peer's
// data or the host's own request, and needs no rate limit.
//
// It reads outgoing frames too, to know what was granted, and joins a frame's
// header and body into one write.
//
// Read is for one goroutine, and so is Write; the rest is for any. Lock
// order: wmu, then mu.
type Guard struct {
	conn io.ReadWriteCloser
	role Role

	// Owned by Read.
	hdr  [HeaderSize]byte
	have int    // bytes of hdr
	body uint32 // bytes left of the frame's body

	lastRead atomic.Int64 // when anything came, nanoseconds after epoch
	epoch    time.Time

	wmu     sync.Mutex // held for a whole frame
	held    [HeaderSize]byte
	holding bool // held awaits its body
	drop    bool // and both are to be dropped

	mu         sync.Mutex
	flows      map[uint32]*Flow
	newest     uint32 // highest stream id opened so far
	lateFrames int
	lateBytes  int64
	pings      map[uint32]struct{}
	err        error
	leftover   []byte
}

// Flow is what a guard knows of one stream.
type Flow struct {
	recv, send   int64 // bytes the peer may send, bytes we may
	acked        bool
	finIn        atomic.Bool
	finOut, gone bool
}

// Finished reports whether the peer has said that it sends no more. Without
// that, an end of the stream is a session cut short.
func (f *Flow) Finished() bool { return f != nil && f.finIn.Load() }

// NewGuard returns a guard on conn, which it closes when it is closed.
func NewGuard(conn io.ReadWriteCloser, role Role) *Guard {
	return &Guard{
		conn: conn, role: role, epoch: time.Now(),
		flows: map[uint32]*Flow{}, pings: map[uint32]struct{}{},
	}
}

// Read reads what the peer sent, up to a violation; then it returns a
// *[ViolationError] or [ErrAnew].
func (g *Guard) Read(p []byte) (int, error) {
	if err := g.Err(); err != nil {
		return 0, err
	}
	n, err := g.conn.Read(p)
	if n > 0 {
		g.lastRead.Store(int64(time.Since(g.epoch)))
		good, verr := g.scan(p[:n])
		if verr != nil {
			g.fail(verr, p[good:n])
			if good > 0 {
				return good, nil
			}
			return 0, verr
		}
	}
	if err != nil {
		g.fail(err, nil)
	}
	return n, err
}

// scan follows the frames through b and returns how much of it is good.
func (g *Guard) scan(b []byte) (int, error) {
	at := 0
	for at < len(b) {
		if g.body > 0 {
			n := min(uint32(len(b)-at), g.body)
			g.body -= n
			at += int(n)
			continue
		}
		if g.have == 0 && b[at] == magic[0] {
			return at, ErrAnew
		}
		if g.have == 0 && b[at] != 0 {
			return at, violation("byte %#02x where a frame should start", b[at])
		}
		n := copy(g.hdr[g.have:], b[at:])
		if g.have += n; g.have < HeaderSize {
			return len(b), nil
		}
		g.have = 0
		h := parseHeader(g.hdr[:])
		if err := g.received(h); err != nil {
			return at, err
		}
		at += n
		if h.typ == typeData {
			g.body = h.length
		}
	}
	return at, nil
}

type header struct {
	typ    uint8
	flags  uint16
	id     uint32
	length uint32
}

func parseHeader(b []byte) header {
	return header{b[1], binary.BigEndian.Uint16(b[2:]), binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint32(b[8:])}
}

func (h header) String() string {
	return fmt.Sprintf("frame type %d flags %#x stream %d length %d", h.typ, h.flags, h.id, h.length)
}

// received holds one incoming header against the rules.
func (g *Guard) received(h header) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case h.typ > typeGoAway:
		return violation("unknown type: %v", h)
	case h.flags&^(flagSYN|flagACK|flagFIN|flagRST) != 0:
		return violation("unknown flags: %v", h)
	case h.typ == typeGoAway:
		return violation("the peer ended the session, code %d", h.length)
	case h.typ == typePing:
		return g.receivedPing(h)
	case h.length == 0 && h.flags == 0:
		return violation("frame without effect: %v", h)
	case h.typ == typeData && h.length > MaxBody:
		return violation("data frame over %d bytes: %v", MaxBody, h)
	}
	if h.flags&flagSYN != 0 {
		if err := g.receivedSYN(h); err != nil {
			return err
		}
	}
	f := g.flows[h.id]
	if f == nil {
		return g.receivedLate(h)
	}
	if h.flags&flagACK != 0 {
		if g.role == GuestEnd || f.acked {
			return violation("unexpected ACK: %v", h)
		}
		f.acked = true
	}
	if h.typ == typeWindow {
		if f.send += int64(h.length); f.send > MaxWindow {
			return violation("window over %d bytes: %v", MaxWindow, h)
		}
	} else {
		if f.finIn.Load() {
			return violation("data after FIN: %v", h)
		}
		if f.recv -= int64(h.length); f.recv < 0 {
			return violation("window exceeded by %d bytes: %v", -f.recv, h)
		}
	}
	if h.flags&flagRST != 0 {
		g.forget(h.id, f)
		return nil
	}
	if h.flags&flagFIN != 0 {
		if f.finIn.Swap(true) {
			return violation("second FIN: %v", h)
		}
		if f.finOut {
			g.forget(h.id, f)
		}
	}
	return nil
}

func (g *Guard) receivedPing(h header) error {
	if g.role == GuestEnd {
		if h.flags != flagSYN {
			return violation("answer to no ping: %v", h)
		}
		return nil
	}
	if h.flags != flagACK {
		return violation("a guest does not ping: %v", h)
	}
	if _, ok := g.pings[h.length]; !ok {
		return violation("answer to no ping: %v", h)
	}
	delete(g.pings, h.length)
	return nil
}

func (g *Guard) receivedSYN(h header) error {
	if g.role == HostEnd {
		return violation("a guest does not open streams: %v", h)
	}
	// Streams opened at the same time may arrive in another order than that of
	// their ids.
	if h.id%2 == 0 || g.flows[h.id] != nil || len(g.flows) >= 2*MaxStreams {
		return violation("unexpected SYN: %v", h)
	}
	g.open(h.id)
	return nil
}

// receivedLate judges a frame for a stream that is not open. yamux skips it.
func (g *Guard) receivedLate(h header) error {
	if h.id%2 == 0 || h.id > g.newest {
		return violation("no such stream: %v", h)
	}
	if h.typ == typeData && h.length > 0 {
		g.lateBytes -= int64(h.length)
	} else {
		g.lateFrames--
	}
	if g.lateBytes < 0 || g.lateFrames < 0 {
		return violation("stream has ended: %v", h)
	}
	return nil
}

func (g *Guard) open(id uint32) *Flow {
	f := &Flow{recv: initialWindow, send: initialWindow}
	g.flows[id] = f
	g.newest = max(g.newest, id)
	return f
}

// forget ends the books on a stream. What the peer had a right to send when
// it ended may still be on its way.
func (g *Guard) forget(id uint32, f *Flow) {
	delete(g.flows, id)
	f.gone = true
	g.lateFrames = min(g.lateFrames+lateFrames, maxLateFrames)
	if !f.finIn.Load() {
		g.lateBytes = min(g.lateBytes+f.recv, maxLateBytes)
	}
}

// Write takes what yamux writes: a header, and in the next call its body. A
// header that has a body is held until then, so that both go out in one write.
func (g *Guard) Write(p []byte) (int, error) {
	g.wmu.Lock()
	if g.holding {
		g.holding = false
		defer g.wmu.Unlock()
		if g.drop {
			return len(p), nil
		}
		if err := writeFrame(g.conn, g.held[:], p); err != nil {
			return 0, err
		}
		return len(p), nil
	}
	defer g.wmu.Unlock()
	if len(p) != HeaderSize {
		return 0, fmt.Errorf("write link frame: header of %d bytes", len(p))
	}
	h := parseHeader(p)
	drop := g.sent(h)
	if h.typ == typeData && h.length > 0 {
		copy(g.held[:], p)
		g.holding, g.drop = true, drop
		return len(p), nil
	}
	if drop {
		return len(p), nil
	}
	return g.conn.Write(p)
}

// sent books an outgoing header, before the peer can answer it. It reports
// whether the frame must not go out because the stream was reset by [Guard.Reset]
// or closed by [Guard.CloseWrite], which yamux knows nothing of.
func (g *Guard) sent(h header) (drop bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch h.typ {
	case typePing:
		if h.flags == flagSYN && len(g.pings) < maxPings {
			g.pings[h.length] = struct{}{}
			return false
		}
		// Too many unanswered: the answer to this one would not be known.
		return h.flags == flagSYN
	case typeGoAway:
		return false
	}
	if h.flags&flagSYN != 0 {
		g.open(h.id)
	}
	f := g.flows[h.id]
	if f == nil {
		return true
	}
	if h.typ == typeWindow {
		f.recv += int64(h.length)
	} else {
		f.send -= int64(h.length)
	}
	if h.flags&flagRST != 0 {
		g.forget(h.id, f)
		return false
	}
	if h.flags&flagFIN != 0 {
		return g.finish(h.id, f)
	}
	return false
}

// finish books an outgoing FIN and reports whether it is the second.
func (g *Guard) finish(id uint32, f *Flow) (again bool) {
	if f.finOut {
		return true
	}
	f.finOut = true
	if f.finIn.Load() {
		g.forget(id, f)
	}
	return false
}

// Flow returns the books on an open stream, or nil.
func (g *Guard) Flow(id uint32) *Flow {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.flows[id]
}

// Reset tells the peer that nothing it sends on the stream is wanted, unless
// that has been said. yamux itself can only do so after a timeout. It may
// block as long as a write may.
func (g *Guard) Reset(id uint32) error {
	return g.control(id, flagRST, func(f *Flow) bool {
		g.forget(id, f)
		return true
	})
}

// CloseWrite tells the peer that this end sends no more on the stream. The
// caller must not write to it afterwards.
func (g *Guard) CloseWrite(id uint32) error {
	return g.control(id, flagFIN, func(f *Flow) bool { return !g.finish(id, f) })
}

// control sends a frame of its own, with the flag given, if book agrees.
func (g *Guard) control(id uint32, flag uint16, book func(*Flow) bool) error {
	var hdr [HeaderSize]byte
	hdr[1] = typeWindow
	binary.BigEndian.PutUint16(hdr[2:], flag)
	binary.BigEndian.PutUint32(hdr[4:], id)

	g.wmu.Lock()
	defer g.wmu.Unlock()
	g.mu.Lock()
	f := g.flows[id]
	ok := f != nil && book(f)
	g.mu.Unlock()
	if !ok {
		return nil
	}
	_, err := g.conn.Write(hdr[:])
	return err
}

// A frameWriter joins a header and a body itself, in the way that suits it.
type frameWriter interface {
	WriteFrame(hdr, body []byte) error
}

func writeFrame(w io.Writer, hdr, body []byte) error {
	if fw, ok := w.(frameWriter); ok {
		return fw.WriteFrame(hdr, body)
	}
	bufs := net.Buffers{hdr, body}
	_, err := bufs.WriteTo(w)
	return err
}

// fail records why reading ended; the first reason stays.
func (g *Guard) fail(err error, rest []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err == nil {
		g.err, g.leftover = err, slices.Clone(rest)
	}
}

// Err returns why reading ended: a *[ViolationError], [ErrAnew] or the channel's error. It is
// nil while the session runs.
func (g *Guard) Err() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.err
}

// Leftover returns the bytes from a violation on, which yamux has not seen.
// In a guest they are often the HELLO of the next session.
func (g *Guard) Leftover() []byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.leftover
}

// Idle returns for how long nothing has come from the peer.
func (g *Guard) Idle() time.Duration {
	return time.Since(g.epoch) - time.Duration(g.lastRead.Load())
}

// Close closes the channel.
func (g *Guard) Close() error { return g.conn.Close() }

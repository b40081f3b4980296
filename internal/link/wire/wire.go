// Package wire is the part of the agent link that both ends must agree on:
// the handshake's frames, the multiplexer's settings, and the [Guard] that
// holds a peer to them.
//
// It opens nothing and owns no goroutine. The host's end is package link, the
// guest's internal/guest/port; this package imports neither, nor anything
// else of the project, because it is linked into the agent.
//
// # The serial link
//
// A virtio-serial port is one byte stream without edges: either side may have
// been cut off in the middle of a frame, and bytes of an earlier session may
// be left in the buffers between them. Each connection of the host therefore
// begins with a handshake around a nonce that it draws anew:
//
//	host                          guest
//	HELLO   {nonce}      ──────▶  skips everything that is no frame
//	                     ◀──────  WELCOME {nonce}
//	START   {nonce,mode} ──────▶
//	                     ◀──────  STARTED {nonce}
//	══════════ yamux, or raw bytes for a measurement ══════════
//
// The host discards what comes before the WELCOME with its nonce, the guest
// what comes before a HELLO. A HELLO with a new nonce begins again at any
// point. HELLO may be sent many times over, so that a guest which has missed
// the end of the earlier session, and still waits for the rest of a data
// frame, is fed to the end of it: [MaxBody] bounds how much that takes. No
// frame of the handshake contains a zero byte, and a yamux header starts with
// one, so a stale session ends at the first byte past that frame, wherever in
// a HELLO it falls.
//
// The other way round the same serves an agent that ends a session of its own
// accord or has been started again: it sends [Drain] BYE frames, so that the
// host's calls end at once.
//
// # The vsock link
//
// Each connection is one stream. It starts with a KEY frame, which carries
// the key in the nonce's place, because every user of the host may connect to
// a guest's CID. There is no answer, hence no round trip.
package wire

import (
	"io"
	"time"

	"github.com/hashicorp/yamux"
)

const (
	// PortName is the virtio-serial port's name, as in `-device
	// virtserialport,name=agent`.
	PortName = "agent"

	// VsockPort is where the agent listens on vsock.
	VsockPort = 5000

	// Version is the link protocol's. Both ends come from one build, but a
	// machine outlives the daemon that started it.
	Version = 1

	// MaxBody is the most bytes that a yamux data frame carries, on either
	// side; yamux itself knows no limit but the window. Half or twice of it
	// made no difference above the noise (measured as for MaxWindow).
	MaxBody = 64 << 10

	// MaxStreams is how many streams one session may have open.
	MaxStreams = 256

	// MaxRawBytes bounds one measurement of the raw channel.
	MaxRawBytes = 4 << 30
)

// WriteLimit is how long one frame may take to go out before the peer counts
// as stalled. An emulated guest on a loaded host has been seen to take a
// second over a full window.
const WriteLimit = 30 * time.Second

// initialWindow is what yamux gives every new stream; a constant of its
// protocol.
const initialWindow = 256 << 10

// HostConfig returns the yamux settings of the host's end.
func HostConfig() *yamux.Config {
	c := baseConfig()
	// A peer that never acknowledges a stream is not the agent.
	c.StreamOpenTimeout = WriteLimit
	// The host resets a stream that it is done with (see Guard.Reset), so
	// that all yamux has to do afterwards is to forget it.
	c.StreamCloseTimeout = time.Second
	return c
}

// GuestConfig returns the yamux settings of the guest's end.
func GuestConfig() *yamux.Config {
	c := baseConfig()
	c.StreamOpenTimeout = 0
	// The reset that follows this timeout would throw away what a slow reader
	// on the host has not read yet. The host, which is trusted, ends every
	// stream.
	c.StreamCloseTimeout = 0
	return c
}

func baseConfig() *yamux.Config {
	return &yamux.Config{
		AcceptBacklog:          MaxStreams,
		EnableKeepAlive:        false, // an idle machine is left in peace
		KeepAliveInterval:      time.Hour,
		ConnectionWriteTimeout: WriteLimit,
		MaxStreamWindowSize:    MaxWindow,
		LogOutput:              io.Discard, // it would log what the peer sends
	}
}

// WriteBodies writes p to w, a yamux stream, in pieces of at most [MaxBody].
func WriteBodies(w io.Writer, p []byte) (int, error) {
	total := 0
	for {
		n, err := w.Write(p[:min(len(p), MaxBody)])
		total += n
		p = p[n:]
		if err != nil || len(p) == 0 {
			return total, err
		}
	}
}

package server

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"

	"google.golang.org/protobuf/proto"

	agentisov1 "github.com/agentiso/agentiso/api/agentiso/v1"
	"github.com/agentiso/agentiso/internal/fault"
)

// Connect streams are frames: one byte of flags, four of length (big endian),
// then the message; the last frame has flagEnd and holds JSON, an error among
// it or not. https://connectrpc.com/docs/protocol
const (
	frameHeader = 5
	flagEnd     = 0x02
	// wholeFrame is up to which size a frame is passed on only when all of it
	// has come. Agents send 32 KiB and less, so that in practice a stream is
	// always cut between frames.
	wholeFrame = 256 << 10
)

var errCutFrame = errors.New("the stream was cut within a message")

// frameGuard passes a guest's Connect stream on. When it breaks off between
// frames, or within one that nothing was passed on of, it ends with a proper
// last frame that carries the reason; a break within a large frame can only
// be an error. What follows the guest's own last frame is dropped.
type frameGuard struct {
	src     io.ReadCloser
	explain func(error) *fault.Error

	out  bytes.Buffer // ready to be read
	pass int64        // what is left of a large frame to pass on as it comes
	last bool         // the frame being passed on is the last
	end  error        // after out is empty
	buf  [32 << 10]byte
	part []byte // the beginning of a frame that is not whole
}

func newFrameGuard(src io.ReadCloser, explain func(error) *fault.Error) *frameGuard {
	return &frameGuard{src: src, explain: explain}
}

// Close closes the guest's stream.
func (g *frameGuard) Close() error { return g.src.Close() }

func (g *frameGuard) Read(p []byte) (int, error) {
	for {
		if g.out.Len() > 0 {
			return g.out.Read(p)
		}
		if g.end != nil {
			return 0, g.end
		}
		n, err := g.src.Read(g.buf[:])
		g.take(g.buf[:n])
		if err != nil && g.end == nil {
			g.finish(err)
		}
	}
}

// take sorts b into whole frames.
func (g *frameGuard) take(b []byte) {
	for len(b) > 0 && g.end == nil {
		if g.pass > 0 {
			n := min(int64(len(b)), g.pass)
			g.out.Write(b[:n])
			b = b[n:]
			g.passed(n)
			continue
		}
		if need := frameHeader - len(g.part); need > 0 {
			n := min(need, len(b))
			g.part = append(g.part, b[:n]...)
			b = b[n:]
			if len(g.part) < frameHeader {
				return
			}
		}
		size := int64(binary.BigEndian.Uint32(g.part[1:frameHeader]))
		g.last = g.part[0]&flagEnd != 0
		if size > wholeFrame {
			g.out.Write(g.part)
			g.part = g.part[:0]
			g.pass = size
			continue
		}
		n := min(int64(len(b)), frameHeader+size-int64(len(g.part)))
		g.part = append(g.part, b[:n]...)
		b = b[n:]
		if int64(len(g.part)) == frameHeader+size {
			g.out.Write(g.part)
			g.part = g.part[:0]
			g.ended()
		}
	}
}

func (g *frameGuard) passed(n int64) {
	if g.pass -= n; g.pass == 0 {
		g.ended()
	}
}

func (g *frameGuard) ended() {
	if g.last {
		g.end = io.EOF
	}
}

// finish ends a stream that had no last frame.
func (g *frameGuard) finish(err error) {
	if err == io.EOF { //nolint:errorlint // io.Reader's contract
		err = io.ErrUnexpectedEOF
	}
	f := g.explain(err)
	if g.pass > 0 {
		g.end = errCutFrame
		return
	}
	g.part = nil
	g.out.Write(lastFrame(f))
	g.end = io.EOF
}

// lastFrame is the end of a Connect stream with f as its error.
func lastFrame(f *fault.Error) []byte {
	type detail struct {
		Type  string `json:"type"`
		Value string `json:"value"`
	}
	type wireError struct {
		Code    string   `json:"code"`
		Message string   `json:"message"`
		Details []detail `json:"details,omitempty"`
	}
	info := &agentisov1.ErrorInfo{Kind: string(f.Kind), Next: f.Next}
	e := wireError{Code: f.Kind.Codes().Connect.String(), Message: f.Msg}
	if b, err := proto.Marshal(info); err == nil {
		e.Details = []detail{{string(info.ProtoReflect().Descriptor().FullName()), base64.RawStdEncoding.EncodeToString(b)}}
	}
	body, err := json.Marshal(map[string]any{"error": e})
	if err != nil { // strings only: cannot happen
		body = []byte(`{"error":{"code":"unavailable"}}`)
	}
	frame := make([]byte, frameHeader, frameHeader+len(body))
	frame[0] = flagEnd
	binary.BigEndian.PutUint32(frame[1:], uint32(len(body)))
	return append(frame, body...)
}

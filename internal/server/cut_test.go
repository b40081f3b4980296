package server

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"testing"
	"testing/iotest"

	"github.com/agentiso/agentiso/internal/fault"
)

func frame(flags byte, body string) []byte {
	b := make([]byte, 5, 5+len(body))
	b[0] = flags
	binary.BigEndian.PutUint32(b[1:], uint32(len(body)))
	return append(b, body...)
}

func guard(b []byte, end error) *frameGuard {
	src := io.MultiReader(bytes.NewReader(b), iotest.ErrReader(end))
	return newFrameGuard(io.NopCloser(src), func(err error) *fault.Error {
		return fault.New(fault.Unavailable, "cut: %w", err).WithNext("Try again.")
	})
}

func TestFrameGuard(t *testing.T) {
	big := string(bytes.Repeat([]byte("x"), wholeFrame+1))
	reset := errors.New("connection reset")
	for name, c := range map[string]struct {
		in   []byte
		end  error
		want []byte // before the added last frame
		last bool   // a last frame is added
		err  error
	}{
		"whole":               {append(frame(0, "a"), frame(2, "{}")...), reset, append(frame(0, "a"), frame(2, "{}")...), false, nil},
		"dropped after end":   {append(frame(2, "{}"), "junk"...), io.EOF, frame(2, "{}"), false, nil},
		"ends between frames": {frame(0, "a"), io.EOF, frame(0, "a"), true, nil},
		"reset in a header":   {append(frame(0, "a"), 0, 0), reset, frame(0, "a"), true, nil},
		"reset in a frame":    {append(frame(0, "a"), frame(0, "bcd")[:6]...), reset, frame(0, "a"), true, nil},
		"reset in a big one":  {frame(0, big)[:100], reset, frame(0, big)[:100], false, errCutFrame},
		"a big one":           {frame(0, big), io.EOF, frame(0, big), true, nil},
		"empty":               {nil, io.EOF, nil, true, nil},
		"compressed last":     {frame(3, "zip"), io.EOF, frame(3, "zip"), false, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := io.ReadAll(guard(c.in, c.end))
			if !errors.Is(err, c.err) {
				t.Fatalf("error %v, not %v", err, c.err)
			}
			rest, ok := bytes.CutPrefix(got, c.want)
			if !ok {
				t.Fatalf("begins with %.60q, not %.60q", got, c.want)
			}
			if (len(rest) > 0) != c.last {
				t.Fatalf("rest is %q", rest)
			}
			if c.last {
				checkLast(t, rest)
			}
		})
	}
}

func checkLast(t *testing.T, b []byte) {
	t.Helper()
	var m struct {
		Error struct {
			Code, Message string
			Details       []struct{ Type, Value string }
		}
	}
	if len(b) < 5 || b[0] != 2 || int(binary.BigEndian.Uint32(b[1:])) != len(b)-5 {
		t.Fatalf("not a last frame: %q", b)
	}
	if err := json.Unmarshal(b[5:], &m); err != nil || m.Error.Code != "unavailable" || len(m.Error.Details) != 1 {
		t.Fatalf("last frame is %q (%v)", b, err)
	}
}

// FuzzFrameGuard: whatever an agent sends, in whatever pieces, what comes out
// is what went in up to a frame's end and one last frame, or an error.
func FuzzFrameGuard(f *testing.F) {
	f.Add([]byte{}, false)
	f.Add(append(frame(0, "hello"), frame(2, "{}")...), true)
	f.Add([]byte{0, 0xff, 0xff, 0xff, 0xff, 1, 2, 3}, false)
	f.Add(append(frame(0, "a"), 0, 0, 0), true)
	f.Fuzz(func(t *testing.T, in []byte, slow bool) {
		g := guard(in, io.EOF)
		var r io.Reader = g
		if slow {
			g.src = io.NopCloser(iotest.OneByteReader(bytes.NewReader(in)))
			r = iotest.HalfReader(g)
		}
		out, err := io.ReadAll(r)
		if err != nil {
			if !bytes.HasPrefix(in, out) {
				t.Fatalf("%q became %q", in, out)
			}
			return
		}
		// Without an error it must parse as frames with one last at the end.
		for rest := out; ; {
			if len(rest) < 5 {
				t.Fatalf("%q became %q, which is not framed", in, out)
			}
			n := 5 + int(binary.BigEndian.Uint32(rest[1:]))
			if n > len(rest) {
				t.Fatalf("%q became %q, which is cut", in, out)
			}
			if rest[0]&flagEnd != 0 {
				if n != len(rest) {
					t.Fatalf("%q became %q, which goes on after its end", in, out)
				}
				return
			}
			rest = rest[n:]
		}
	})
}

package wire

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"os"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
)

func nonce(b byte) Nonce { return Nonce(bytes.Repeat([]byte{b}, 16)) }

func TestFrameRoundTrip(t *testing.T) {
	for _, f := range []Frame{
		{Kind: Hello, Mode: Mux, Version: 1, Nonce: nonce(0)},
		{Kind: Welcome, Mode: Sink, Version: 255, Nonce: nonce(0xff), Size: MaxRawBytes},
		{Kind: Bye, Mode: Echo, Nonce: nonce(0xa6), Size: 1},
	} {
		b := f.Append(nil)
		if len(b) != FrameSize || bytes.IndexByte(b, 0) >= 0 {
			t.Errorf("%+v is %d bytes, %q: want %d without a zero", f, len(b), b, FrameSize)
		}
		got, err := ParseFrame(b)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(f, got); d != "" {
			t.Error(d)
		}
		for i := range b {
			c := bytes.Clone(b)
			c[i] ^= 1
			if g, err := ParseFrame(c); err == nil && g == f {
				t.Errorf("byte %d does not count", i)
			}
		}
	}
}

// A frame of the handshake must end a stale session wherever that picks up.
func TestFrameEndsStaleSession(t *testing.T) {
	b := Frame{Kind: Hello, Mode: Mux, Version: 1}.Append(nil)
	for i := range b {
		g := NewGuard(pipe{bytes.NewReader(b[i:]), io.Discard}, GuestEnd)
		if _, err := io.ReadAll(g); err == nil {
			t.Errorf("a session that starts at byte %d of a hello goes on", i)
		}
	}
}

func TestScanner(t *testing.T) {
	a := Frame{Kind: Hello, Mode: Mux, Version: 1, Nonce: nonce(1)}
	b := Frame{Kind: Start, Mode: Sink, Version: 1, Nonce: nonce(2), Size: 9}
	broken := a.Append(nil)
	broken[20]++
	for _, tt := range []struct {
		name string
		in   [][]byte
		want []Frame
	}{
		{"clean", [][]byte{a.Append(nil), b.Append(nil)}, []Frame{a, b}},
		{"garbage before", [][]byte{bytes.Repeat([]byte{0, 0xa6, 'i'}, 5000), a.Append(nil)}, []Frame{a}},
		{"half a frame before", [][]byte{a.Append(nil)[:40], b.Append(nil)}, []Frame{b}},
		{"broken frame before", [][]byte{broken, b.Append(nil)}, []Frame{b}},
		{"magic before", [][]byte{[]byte(magic), a.Append(nil)}, []Frame{a}},
		{"half magic at the end", [][]byte{a.Append(nil), []byte(magic[:3])}, []Frame{a}},
	} {
		for _, r := range []struct {
			name string
			wrap func(io.Reader) io.Reader
		}{{"whole", func(r io.Reader) io.Reader { return r }}, {"bytewise", iotest.OneByteReader}} {
			t.Run(tt.name+" "+r.name, func(t *testing.T) {
				s := NewScanner(bufio.NewReader(r.wrap(bytes.NewReader(bytes.Join(tt.in, nil)))), -1)
				for _, want := range tt.want {
					got, err := s.Next()
					if err != nil {
						t.Fatal(err)
					}
					if d := cmp.Diff(want, got); d != "" {
						t.Error(d)
					}
				}
				if f, err := s.Next(); err == nil {
					t.Errorf("and then %+v", f)
				}
			})
		}
	}
}

func TestScannerLimit(t *testing.T) {
	f := Frame{Kind: Welcome, Mode: Mux}.Append(nil)
	for _, in := range [][]byte{bytes.Repeat([]byte{'x'}, 2000), bytes.Repeat(f, 30), bytes.Repeat([]byte(magic), 300)} {
		s := NewScanner(bufio.NewReader(io.MultiReader(bytes.NewReader(in), &forever{})), 1000)
		var err error
		for err == nil {
			_, err = s.Next()
		}
		if !errors.Is(err, ErrTooMuch) {
			t.Errorf("%q…: %v", in[:10], err)
		}
	}
}

type forever struct{}

func (*forever) Read(p []byte) (int, error) { return len(p), nil }

// A deadline in the middle of a frame loses nothing.
func TestScannerResumes(t *testing.T) {
	f := Frame{Kind: Hello, Mode: Mux, Nonce: nonce(7)}
	for cut := range FrameSize {
		b := f.Append(nil)
		s := NewScanner(bufio.NewReader(io.MultiReader(
			bytes.NewReader(b[:cut]), iotest.ErrReader(os.ErrDeadlineExceeded))), -1)
		if _, err := s.Next(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("cut at %d: %v", cut, err)
		}
		s.r = bufio.NewReader(io.MultiReader(bytes.NewReader(buffered(s.r)), bytes.NewReader(b[cut:])))
		if got, err := s.Next(); err != nil || got != f {
			t.Fatalf("cut at %d: %+v, %v", cut, got, err)
		}
	}
}

func buffered(r *bufio.Reader) []byte {
	b, _ := r.Peek(r.Buffered())
	return b
}

func FuzzScanner(f *testing.F) {
	hello := Frame{Kind: Hello, Mode: Mux, Version: 1, Nonce: nonce(3)}.Append(nil)
	f.Add(hello)
	f.Add(append(hello[:30:30], hello...))
	f.Add(append([]byte(magic+"\x00"), hello...))
	f.Add([]byte{0xa6})
	f.Fuzz(func(t *testing.T, b []byte) {
		const limit = 4096
		s := NewScanner(bufio.NewReader(bytes.NewReader(b)), limit)
		for n := 0; ; n++ {
			got, err := s.Next()
			if err != nil {
				break
			}
			if !bytes.Contains(bytes.ToLower(b), bytes.ToLower(got.Append(nil)[len(magic)+2:60])) {
				t.Errorf("found %+v, which is not in %q", got, b)
			}
			if n > limit/FrameSize {
				t.Fatal("more frames than the limit lets through")
			}
		}
	})
}

package wire

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"strconv"
)

// Nonce names one handshake of the serial link, or is the key of a vsock one.
type Nonce [16]byte

// Kind says what a frame is for.
type Kind byte

// The kinds; on the wire they are these letters.
const (
	Hello   Kind = 'H' // host: begin anew
	Welcome Kind = 'W' // guest: ready for that nonce's start
	Start   Kind = 'S' // host: begin the mode
	Started Kind = 'T' // guest: the mode's first byte comes next
	Bye     Kind = 'B' // guest: whatever went on is over
	Key     Kind = 'K' // vsock: the connection's first bytes
)

// Mode says what follows the handshake.
type Mode byte

// The modes. All but Mux are for measuring the channel by itself: they carry
// Size zero bytes, then (Sink only) one byte [SinkDone] from the guest. Zeros,
// so that a guest left alone in the middle knows a HELLO when it comes.
const (
	Mux    Mode = 'm' // yamux on serial, the stream itself on vsock
	Sink   Mode = 'k' // the guest reads
	Source Mode = 's' // the guest writes
	Echo   Mode = 'e' // the guest returns what it reads
)

// SinkDone is the guest's answer once it has read all of a Sink.
const SinkDone = 0x06

// Frame is one message of the handshake.
type Frame struct {
	Kind    Kind
	Mode    Mode
	Version uint8
	Nonce   Nonce
	Size    int64 // bytes of a raw mode, at most MaxRawBytes
}

// FrameSize is a frame's length on the wire, in bytes:
//
//	0   8  magic
//	8   1  kind
//	9   1  mode
//	10  2  version, hexadecimal
//	12 32  nonce, hexadecimal
//	44 16  size, hexadecimal
//	60  8  CRC-32C of bytes 0 to 59, hexadecimal
const FrameSize = 68

// magic starts with a byte that is neither a yamux version nor ASCII.
const magic = "\xa6isolink"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Append appends f's wire form to b. No byte of it is zero.
func (f Frame) Append(b []byte) []byte {
	at := len(b)
	b = append(b, magic...)
	b = append(b, byte(f.Kind), byte(f.Mode))
	b = hex.AppendEncode(b, []byte{f.Version})
	b = hex.AppendEncode(b, f.Nonce[:])
	b = fmt.Appendf(b, "%016x", uint64(f.Size))
	return fmt.Appendf(b, "%08x", crc32.Checksum(b[at:], castagnoli))
}

// Drain is how many frames in a row end any session that the other end still
// believes in: they fill up a data frame of which it has seen only the header.
const Drain = (MaxBody+HeaderSize)/FrameSize + 2

// AppendCopies appends f's wire form n times over.
func (f Frame) AppendCopies(b []byte, n int) []byte {
	one := f.Append(nil)
	for range n {
		b = append(b, one...)
	}
	return b
}

// Errors of ParseFrame and Scanner.
var (
	ErrNotFrame = errors.New("not a link frame")
	ErrTooMuch  = errors.New("too many bytes before the answer to the hello")
)

// ParseFrame reads the frame that b starts with. It returns [ErrNotFrame] for
// everything that [Frame.Append] cannot have made.
func ParseFrame(b []byte) (Frame, error) {
	var f Frame
	if len(b) < FrameSize || string(b[:8]) != magic {
		return f, ErrNotFrame
	}
	sum, err := strconv.ParseUint(string(b[60:68]), 16, 32)
	if err != nil || crc32.Checksum(b[:60], castagnoli) != uint32(sum) {
		return f, ErrNotFrame
	}
	f.Kind, f.Mode = Kind(b[8]), Mode(b[9])
	switch f.Kind {
	case Hello, Welcome, Start, Started, Bye, Key:
	default:
		return Frame{}, ErrNotFrame
	}
	switch f.Mode {
	case Mux, Sink, Source, Echo:
	default:
		return Frame{}, ErrNotFrame
	}
	var version [1]byte
	if _, err := hex.Decode(version[:], b[10:12]); err != nil {
		return Frame{}, ErrNotFrame
	}
	f.Version = version[0]
	if _, err := hex.Decode(f.Nonce[:], b[12:44]); err != nil {
		return Frame{}, ErrNotFrame
	}
	size, err := strconv.ParseUint(string(b[44:60]), 16, 63)
	if err != nil || size > MaxRawBytes {
		return Frame{}, ErrNotFrame
	}
	f.Size = int64(size)
	return f, nil
}

// Scanner finds frames among stale and half-written bytes. It reads no byte
// past the frame that it returns.
type Scanner struct {
	r    *bufio.Reader
	left int64 // bytes that may still be taken; negative: any number
}

// NewScanner returns a scanner on r, whose buffer must hold a frame. It takes
// at most limit bytes altogether, frames included; a negative limit is none.
func NewScanner(r *bufio.Reader, limit int64) *Scanner {
	return &Scanner{r: r, left: limit}
}

// Next returns the next frame. After an error of the reader, such as a
// deadline's, Next may be called again and loses nothing. [ErrTooMuch] means
// that the limit was reached.
func (s *Scanner) Next() (Frame, error) {
	for {
		if _, err := s.r.Peek(1); err != nil {
			return Frame{}, err
		}
		b, _ := s.r.Peek(s.r.Buffered())
		at := bytes.IndexByte(b, magic[0])
		if at < 0 {
			at = len(b)
		}
		if err := s.skip(at); err != nil {
			return Frame{}, err
		}
		if at == len(b) {
			continue
		}
		// Only a whole magic is worth waiting for a whole frame.
		if b = b[at:]; len(b) < len(magic) || string(b[:len(magic)]) == magic {
			want := FrameSize
			if len(b) < len(magic) {
				want = len(magic)
			}
			b, err := s.r.Peek(want)
			if err != nil {
				return Frame{}, err
			}
			if want < FrameSize && string(b) == magic {
				continue
			}
			if f, err := ParseFrame(b); err == nil {
				return f, s.skip(FrameSize)
			}
		}
		if err := s.skip(1); err != nil {
			return Frame{}, err
		}
	}
}

func (s *Scanner) skip(n int) error {
	if s.left >= 0 {
		if int64(n) > s.left {
			return ErrTooMuch
		}
		s.left -= int64(n)
	}
	_, err := s.r.Discard(n)
	return err
}

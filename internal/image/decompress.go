package image

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

const (
	// zstdWindow is what zstd --ultra -22 uses; larger windows are for
	// archives made to cost memory.
	zstdWindow = 128 << 20
	// xzDictionary is four times that of xz -9.
	xzDictionary = 256 << 20
)

// compression is one way in which archives are packed.
type compression struct {
	name  string
	magic string
	layer bool // may be a layer of an OCI image
	open  func(io.Reader) (io.Reader, func(), error)
}

var compressions = []compression{
	{"gzip", "\x1f\x8b", true, func(r io.Reader) (io.Reader, func(), error) {
		z, err := gzip.NewReader(r)
		return z, func() {}, err
	}},
	{"zstd", "\x28\xb5\x2f\xfd", true, func(r io.Reader) (io.Reader, func(), error) {
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(zstdWindow))
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	}},
	{"xz", "\xfd7zXZ\x00", false, openXZ},
	{"bzip2", "BZh", false, func(r io.Reader) (io.Reader, func(), error) {
		return bzip2.NewReader(r), func() {}, nil
	}},
}

// unpacked opens a stream that may be compressed. Errors of r itself come
// through as they are; what is wrong with the compressed data is errArchive.
// close frees what the decoder holds, not r.
func unpacked(r io.Reader, layer bool) (_ *bufio.Reader, closeFn func(), err error) {
	src := &origin{r: r}
	br := bufio.NewReaderSize(src, 64<<10)
	head, err := br.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, src.explain("plain", err)
	}
	for _, c := range compressions {
		if !bytes.HasPrefix(head, []byte(c.magic)) || layer && !c.layer {
			continue
		}
		z, closeFn, err := c.open(br)
		if err != nil {
			return nil, nil, src.explain(c.name, err)
		}
		return bufio.NewReaderSize(&decoder{z, src, c.name}, 64<<10), closeFn, nil
	}
	return br, func() {}, nil
}

// origin remembers whether it was the bytes' origin that failed.
type origin struct {
	r   io.Reader
	err error
}

func (s *origin) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

func (s *origin) explain(format string, err error) error {
	if s.err != nil {
		return s.err
	}
	return fmt.Errorf("%w: its %s data is damaged or cut short: %w", errArchive, format, err)
}

type decoder struct {
	z      io.Reader
	src    *origin
	format string
}

func (d *decoder) Read(p []byte) (int, error) {
	n, err := d.z.Read(p)
	if err != nil && err != io.EOF { //nolint:errorlint // io.Reader's contract is the very value
		err = d.src.explain(d.format, err)
	}
	return n, err
}

// openXZ refuses a first block whose dictionary is for costing memory: the
// decoder would allocate what the header asks for.
func openXZ(r io.Reader) (io.Reader, func(), error) {
	br, ok := r.(*bufio.Reader)
	if !ok {
		br = bufio.NewReader(r)
	}
	// Stream header, 12 bytes; block header: size, flags, optional sizes, and
	// for LZMA2 its id 0x21, property size 1 and the dictionary's size.
	if head, err := br.Peek(12 + 2 + 2*9 + 3); err == nil {
		if size, ok := xzDictionarySize(head[12:]); ok && size > xzDictionary {
			return nil, nil, fmt.Errorf("its dictionary of %d MiB is larger than %d MiB", size>>20, xzDictionary>>20)
		}
	}
	z, err := xz.NewReader(br)
	return z, func() {}, err
}

// xzDictionarySize reads the LZMA2 dictionary's size out of a block header
// with one filter.
func xzDictionarySize(b []byte) (int64, bool) {
	flags := b[1]
	at := 2
	for _, bit := range []byte{0x40, 0x80} { // compressed and uncompressed size
		if flags&bit == 0 {
			continue
		}
		for at < len(b) && b[at]&0x80 != 0 {
			at++
		}
		at++
	}
	if at+2 >= len(b) || b[at] != 0x21 || b[at+1] != 1 || b[at+2] > 40 {
		return 0, false
	}
	bits := int64(b[at+2])
	return (2 | bits&1) << (bits/2 + 11), true
}

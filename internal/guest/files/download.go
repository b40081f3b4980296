package files

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"os"
	"path"
	"time"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/guest/access"
	"github.com/agentiso/agentiso/internal/guest/users"
)

// stallTimeout ends a transfer of which nothing has moved for so long. It is
// above what a paused machine or a slow consumer needs.
const stallTimeout = 10 * time.Minute

// download answers GET and HEAD /files.
func (s *Service) download(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	u, err := s.admit(r, query, access.Read)
	if err != nil {
		s.reply(w, r, err)
		return
	}
	p, err := resolve(u, query.Get("path"))
	if err != nil {
		s.reply(w, r, err)
		return
	}
	zip, err := wantsGzip(r.Header)
	if err != nil {
		s.reply(w, r, err)
		return
	}
	f, fi, err := openForReading(u, p)
	if err != nil {
		s.reply(w, r, err)
		return
	}
	defer f.Close()
	buf := buffers.Get().(*[bufferBytes]byte)
	defer buffers.Put(buf)

	// The size that the kernel reports for files of /proc and /sys is not
	// that of their content. Whatever ends within one buffer is answered from
	// there, with its true length.
	n, err := readFull(untilDry{f}, buf[:])
	h := w.Header()
	h.Set("Vary", "Accept-Encoding")
	if err != nil && !errors.Is(err, io.EOF) {
		s.reply(w, r, err)
		return
	}
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Content-Disposition", mime.FormatMediaType("inline", map[string]string{"filename": valid(path.Base(p))}))
	whole := errors.Is(err, io.EOF)
	out := &bulkWriter{ResponseWriter: w, rc: http.NewResponseController(w)}
	defer out.release()
	switch {
	case zip:
		h.Set("Content-Encoding", "gzip")
		h.Set("Last-Modified", fi.ModTime().UTC().Format(http.TimeFormat))
		if r.Method == http.MethodHead {
			return
		}
		writeZipped(out, io.MultiReader(bytes.NewReader(buf[:n]), unlessWhole(f, whole)))
	case whole:
		http.ServeContent(out, r, "", fi.ModTime(), bytes.NewReader(buf[:n]))
	case fi.Size() >= int64(n):
		http.ServeContent(out, r, "", fi.ModTime(), f)
	default: // longer than it says: of unknown size
		if r.Method == http.MethodHead {
			return
		}
		_, err := out.ReadFrom(io.MultiReader(bytes.NewReader(buf[:n]), untilDry{f}))
		if err != nil {
			panic(http.ErrAbortHandler)
		}
	}
}

// openForReading is openRegular as u.
func openForReading(u users.User, p string) (f *os.File, fi fs.FileInfo, err error) {
	err = u.Do(func() (err error) {
		f, fi, err = openRegular(p)
		return err
	})
	return f, fi, err
}

// openRegular opens a regular file and says otherwise why not. Nothing else is
// opened: that can wait for ever or have effects.
func openRegular(p string) (*os.File, fs.FileInfo, error) {
	if _, err := statRegular(p); err != nil {
		return nil, nil, err
	}
	// Between the two calls a FIFO can take the file's place.
	f, err := os.OpenFile(p, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = invalidf("path '%s' is %s", valid(p), kind(fi.Mode()))
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, fi, nil
}

func statRegular(p string) (fs.FileInfo, error) {
	fi, err := os.Stat(p)
	switch {
	case absent(err):
		return nil, absentf("path '%s' does not exist", valid(p))
	case err != nil:
		return nil, err
	case !fi.Mode().IsRegular():
		return nil, invalidf("path '%s' is %s", valid(p), kind(fi.Mode()))
	}
	return fi, nil
}

// untilDry is a file that has ended when it has no more to give now:
// /proc/kmsg would wait for more.
type untilDry struct{ f io.Reader }

func (d untilDry) Read(b []byte) (int, error) {
	n, err := d.f.Read(b)
	if errors.Is(err, unix.EAGAIN) {
		err = io.EOF
	}
	return max(n, 0), err
}

func unlessWhole(f io.Reader, whole bool) io.Reader {
	if whole {
		return bytes.NewReader(nil)
	}
	return untilDry{f}
}

func writeZipped(w io.Writer, r io.Reader) {
	z := zippers.Get().(*gzip.Writer)
	defer func() {
		z.Reset(nil)
		zippers.Put(z)
	}()
	buf := buffers.Get().(*[bufferBytes]byte)
	defer buffers.Put(buf)
	z.Reset(w)
	_, err := io.CopyBuffer(struct{ io.Writer }{z}, struct{ io.Reader }{r}, buf[:])
	if err == nil {
		err = z.Close()
	}
	if err != nil {
		// The header has gone: only a cut connection says that this is not all.
		panic(http.ErrAbortHandler)
	}
}

// bulkWriter gives net/http's copying loop a large buffer, and every piece its
// own deadline.
type bulkWriter struct {
	http.ResponseWriter
	rc *http.ResponseController
}

func (b *bulkWriter) Unwrap() http.ResponseWriter { return b.ResponseWriter }

func (b *bulkWriter) Write(p []byte) (int, error) {
	// Carriers without deadlines end a stalled transfer themselves.
	_ = b.rc.SetWriteDeadline(time.Now().Add(stallTimeout))
	return b.ResponseWriter.Write(p)
}

func (b *bulkWriter) release() { _ = b.rc.SetWriteDeadline(time.Time{}) }

// ReadFrom is what io.Copy in http.ServeContent uses.
func (b *bulkWriter) ReadFrom(r io.Reader) (int64, error) {
	buf := buffers.Get().(*[bufferBytes]byte)
	defer buffers.Put(buf)
	return io.CopyBuffer(struct{ io.Writer }{b}, struct{ io.Reader }{r}, buf[:])
}

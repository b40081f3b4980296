package files

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"mime"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"path"
	"time"

	"github.com/agentiso/agentiso/internal/guest/access"
	"github.com/agentiso/agentiso/internal/guest/users"
)

// Bounds of one upload.
const (
	maxUploadFiles = 10_000
	// maxDrain is how much of a refused body is read away so that the caller,
	// still sending, sees the answer and not a broken pipe.
	maxDrain     = 64 << 20
	drainTimeout = 10 * time.Second
)

// written is one file in the answer to an upload.
type written struct {
	Name     string            `json:"name"`
	Type     string            `json:"type"`
	Path     string            `json:"path"`
	Metadata map[string]string `json:"metadata,omitempty"`
}

func writtenTo(p string, meta map[string]string) written {
	return written{Name: valid(path.Base(p)), Type: "file", Path: valid(p), Metadata: meta}
}

// upload answers POST /files.
func (s *Service) upload(w http.ResponseWriter, r *http.Request) {
	body := &body{r: r.Body, rc: http.NewResponseController(w)}
	r.Body = body
	defer body.release()
	list, err := s.receive(r)
	if err != nil {
		body.drain(r)
		s.reply(w, r, err)
		return
	}
	answer(w, http.StatusOK, list)
}

func (s *Service) receive(r *http.Request) ([]written, error) {
	query := r.URL.Query()
	u, err := s.admit(r, query, access.Write)
	if err != nil {
		return nil, err
	}
	meta, err := metadataOf(r.Header)
	if err != nil {
		return nil, err
	}
	kind, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil {
		return nil, invalidf("Content-Type must be multipart/form-data or application/octet-stream")
	}
	data, err := decoded(r)
	if err != nil {
		return nil, err
	}
	// What a compressed body will need is not known.
	size := r.ContentLength
	if data != io.Reader(r.Body) {
		size = -1
	}
	switch kind {
	case "application/octet-stream":
		p, err := resolveFile(u, query.Get("path"))
		if err != nil {
			return nil, err
		}
		if err := s.write(r.Context(), u, p, data, size, meta); err != nil {
			return nil, err
		}
		return []written{writtenTo(p, meta)}, nil
	case "multipart/form-data":
		if params["boundary"] == "" {
			return nil, invalidf("Content-Type has no boundary")
		}
		parts := multipart.NewReader(data, params["boundary"])
		return s.receiveParts(r.Context(), u, parts, query.Get("path"), size, meta)
	}
	return nil, invalidf("unsupported Content-Type %.64q: use multipart/form-data or application/octet-stream", kind)
}

// receiveParts writes the parts named "file". All of them get the metadata.
func (s *Service) receiveParts(ctx context.Context, u users.User, parts *multipart.Reader, to string, size int64, meta map[string]string) ([]written, error) {
	list := []written{}
	seen := map[string]bool{}
	for {
		part, err := parts.NextRawPart()
		if errors.Is(err, io.EOF) {
			if len(list) == 0 {
				return nil, invalidf("the form has no field \"file\"")
			}
			return list, nil
		}
		if err != nil {
			return nil, invalidf("the form is damaged: %v", err)
		}
		field, name := disposition(part.Header)
		if field != "file" {
			continue
		}
		if to != "" {
			if len(list) > 0 {
				return nil, invalidf("only one file can be uploaded to the path '%s'", valid(to))
			}
			name = to
		}
		if len(list) == maxUploadFiles {
			return nil, invalidf("more than %d files in one upload", maxUploadFiles)
		}
		p, err := resolveFile(u, name)
		if err != nil {
			return nil, err
		}
		if seen[p] {
			return nil, invalidf("'%s' is in the upload twice", valid(p))
		}
		seen[p] = true
		// Only with one file is the body's size that file's, and never less.
		need := int64(-1)
		if to != "" && size >= 0 {
			need = max(0, size-formOverhead)
		}
		if err := s.write(ctx, u, p, &formData{part}, need, meta); err != nil {
			return nil, err
		}
		list = append(list, writtenTo(p, meta))
	}
}

// formOverhead is more than the boundaries and headers of a form with one file
// take.
const formOverhead = 8 << 10

// disposition reads a part's field and file name. Part.FileName would cut the
// directories off, which clients of this API send.
func disposition(h textproto.MIMEHeader) (field, file string) {
	_, params, err := mime.ParseMediaType(h.Get("Content-Disposition"))
	if err != nil {
		return "", ""
	}
	return params["name"], params["filename"]
}

// formData says that a form which ends too early is the caller's fault.
type formData struct{ part *multipart.Part }

func (f *formData) Read(b []byte) (int, error) {
	n, err := f.part.Read(b)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = invalidf("the form ends within a file")
	}
	return n, err
}

// body is a request's body of which every piece has its own deadline.
type body struct {
	r     io.ReadCloser
	rc    *http.ResponseController
	began bool
	ended bool
}

func (b *body) Read(p []byte) (int, error) {
	_ = b.rc.SetReadDeadline(time.Now().Add(stallTimeout))
	b.began = true
	n, err := b.r.Read(p)
	b.ended = b.ended || err != nil
	return n, err
}

func (b *body) Close() error { return b.r.Close() }

func (b *body) release() { _ = b.rc.SetReadDeadline(time.Time{}) }

// drain reads what is left of a refused body, within bounds. A caller that
// waits for "100 Continue" has not sent any.
func (b *body) drain(r *http.Request) {
	if b.ended || !b.began && r.Header.Get("Expect") != "" {
		return
	}
	_ = b.rc.SetReadDeadline(time.Now().Add(drainTimeout))
	buf := buffers.Get().(*[bufferBytes]byte)
	defer buffers.Put(buf)
	_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{io.LimitReader(b.r, maxDrain)}, buf[:])
	if errors.Is(err, fs.ErrClosed) {
		b.ended = true
	}
}

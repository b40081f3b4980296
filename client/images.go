package client

import (
	"context"
	"io"
	"net/http"
	"net/url"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"

	agentisov1 "github.com/agentiso/agentiso/api/agentiso/v1"
)

// BuildImageOptions say what to build.
type BuildImageOptions struct {
	Recipe string // minimal, dev or dev-full
	Name   string // "": the recipe's
	Force  bool   // build even when it is there
}

// event is one message of a stream that reports progress and ends with what
// was made.
type event interface {
	GetProgress() *agentisov1.Progress
}

// follow reads such a stream; report may be nil.
func follow[M any, E interface {
	*M
	event
}](stream *connect.ServerStreamForClient[M], report func(Progress), last func(E) bool) error {
	defer stream.Close()
	ended := false
	for stream.Receive() {
		e := E(stream.Msg())
		if p := e.GetProgress(); p != nil && report != nil {
			report(progressIn(p))
		}
		ended = last(e) || ended
	}
	if err := stream.Err(); err != nil {
		return err
	}
	if !ended {
		return &Error{Kind: Internal, Message: "the daemon ended without a result", Next: "Look at the daemon's log."}
	}
	return nil
}

// BuildImage makes one of the built-in images. The end of ctx ends the build.
func (c *Client) BuildImage(ctx context.Context, o BuildImageOptions, report func(Progress)) (*Image, error) {
	stream, err := c.images.Build(ctx, connect.NewRequest(&agentisov1.BuildImageRequest{Recipe: o.Recipe, Name: o.Name, Force: o.Force}))
	if err != nil {
		return nil, c.failed(ctx, "building image "+o.Recipe, err)
	}
	var image *Image
	err = follow(stream, report, func(e *agentisov1.BuildImageResponse) bool {
		if e.GetImage() != nil {
			image = imageIn(e.GetImage())
		}
		return image != nil
	})
	if err != nil {
		return nil, c.failed(ctx, "building image "+o.Recipe, err)
	}
	return image, nil
}

// PullImageOptions say which OCI image to fetch.
type PullImageOptions struct {
	Reference string
	Name      string // "": the reference's repository and tag
	Insecure  bool   // plain HTTP; loopback registries need no asking
	Auth      RegistryAuth
}

// RegistryAuth is one registry's credentials as Docker's configuration has
// them; the zero value is anonymous.
type RegistryAuth struct {
	Username      string
	Password      string
	IdentityToken string
	RegistryToken string
}

// PullImage fetches an OCI image from a registry. The end of ctx ends it.
func (c *Client) PullImage(ctx context.Context, o PullImageOptions, report func(Progress)) (*Image, error) {
	stream, err := c.images.Pull(ctx, connect.NewRequest(&agentisov1.PullImageRequest{
		Reference: o.Reference, Name: o.Name, Insecure: o.Insecure,
		Auth: &agentisov1.RegistryAuth{
			Username: o.Auth.Username, Password: o.Auth.Password,
			IdentityToken: o.Auth.IdentityToken, RegistryToken: o.Auth.RegistryToken,
		},
	}))
	if err != nil {
		return nil, c.failed(ctx, "pulling "+o.Reference, err)
	}
	var image *Image
	err = follow(stream, report, func(e *agentisov1.PullImageResponse) bool {
		if e.GetImage() != nil {
			image = imageIn(e.GetImage())
		}
		return image != nil
	})
	if err != nil {
		return nil, c.failed(ctx, "pulling "+o.Reference, err)
	}
	return image, nil
}

// maxImageAnswer bounds the daemon's description of one image.
const maxImageAnswer = 4 << 20

// ImportImage makes an image of a tar stream of a root file system, plain or
// compressed with gzip, xz or zstd. The daemon writes as it reads.
func (c *Client) ImportImage(ctx context.Context, name string, tar io.Reader) (*Image, error) {
	doing := "importing image " + name
	// Hiding the reader's type keeps net/http from guessing a length or
	// closing a file that is the caller's.
	body := struct{ io.Reader }{tar}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, baseURL+"/images/import?"+url.Values{"name": {name}}.Encode(), body)
	if err != nil {
		return nil, c.failed(ctx, doing, err)
	}
	req.Header.Set("Content-Type", "application/x-tar")
	res, err := c.http.Do(req)
	if err != nil {
		return nil, c.failed(ctx, doing, err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, fromHTTP(doing, res)
	}
	b, err := io.ReadAll(io.LimitReader(res.Body, maxImageAnswer))
	if err != nil {
		return nil, c.failed(ctx, doing, err)
	}
	m := &agentisov1.Image{}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(b, m); err != nil {
		return nil, &Error{Kind: Internal, Message: doing + ": the daemon's answer cannot be read: " + err.Error(), Next: "Use a client of the daemon's version.", Err: err}
	}
	return imageIn(m), nil
}

// Images returns all images.
func (c *Client) Images(ctx context.Context) ([]*Image, error) {
	res, err := c.images.List(ctx, connect.NewRequest(&agentisov1.ListImagesRequest{}))
	if err != nil {
		return nil, c.failed(ctx, "listing images", err)
	}
	all := make([]*Image, 0, len(res.Msg.GetImages()))
	for _, i := range res.Msg.GetImages() {
		all = append(all, imageIn(i))
	}
	return all, nil
}

// Image returns one image by name, digest or digest prefix, with the
// workspaces that stand on it; "" is the daemon's default image.
func (c *Client) Image(ctx context.Context, ref string) (*Image, error) {
	res, err := c.images.Get(ctx, connect.NewRequest(&agentisov1.GetImageRequest{Ref: ref}))
	if err != nil {
		return nil, c.failed(ctx, "looking up image "+ref, err)
	}
	i := imageIn(res.Msg.GetImage())
	i.UsedBy = res.Msg.GetUsedBy()
	return i, nil
}

// RemoveImage deletes a name, and the disk when no other name and no workspace
// needs it.
func (c *Client) RemoveImage(ctx context.Context, ref string) (digest string, diskRemoved bool, err error) {
	res, err := c.images.Remove(ctx, connect.NewRequest(&agentisov1.RemoveImageRequest{Ref: ref}))
	if err != nil {
		return "", false, c.failed(ctx, "removing image "+ref, err)
	}
	return res.Msg.GetDigest(), res.Msg.GetDiskRemoved(), nil
}

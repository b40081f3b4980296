package main

import (
	"context"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"

	"github.com/agentiso/agentiso/client"
	"github.com/agentiso/agentiso/internal/fault"
)

// registryAuth finds this user's credentials for an image's registry where
// Docker keeps them. Credentials are the client's: the daemon may be another
// user's.
func registryAuth(ctx context.Context, reference string) (client.RegistryAuth, error) {
	ref, err := name.ParseReference(reference)
	if err != nil {
		return client.RegistryAuth{}, fault.New(fault.Invalid, "%q is not an image reference: %w", reference, err).
			WithNext("Write REGISTRY/REPOSITORY:TAG or REGISTRY/REPOSITORY@DIGEST.")
	}
	auth, err := authn.Resolve(ctx, authn.DefaultKeychain, ref.Context())
	if err != nil {
		return client.RegistryAuth{}, fault.New(fault.Unauthorized, "read the credentials for %s: %w", ref.Context().RegistryStr(), err).
			WithNext("Check ~/.docker/config.json and its credential helper.")
	}
	cfg, err := authn.Authorization(ctx, auth)
	if err != nil {
		return client.RegistryAuth{}, fault.New(fault.Unauthorized, "read the credentials for %s: %w", ref.Context().RegistryStr(), err).
			WithNext("Check ~/.docker/config.json and its credential helper.")
	}
	return client.RegistryAuth{
		Username: cfg.Username, Password: cfg.Password, IdentityToken: cfg.IdentityToken, RegistryToken: cfg.RegistryToken,
	}, nil
}
